"""Measure how fast this machine trains, and what each part of it costs or saves.

    python -m tools.studies.speed OUT --feature_size 48 --patch_size 96 96 96 --volume 192 192 192

Four measurements, each on synthetic CT drawn for it: the training step of each precision and option; a random crop by
each way to the data, with the files in the system's page cache and, cold, out of it; a real training's iterations and
the share of them that is waiting for data; sliding-window inference of a whole volume. Everything is measured in a
fresh process of its own, whose peak memory is its own, and in rounds, A B C A B C, so that what else happens on the
machine meets all alike. CPU seconds are those of the process's threads, and say more where the machine is not idle.
Ratios are of medians, to the first row; seconds of one run can be compared with each other, not with those of another
machine. Written to OUT: speed.json, speed.md. The same command adds rounds to what is there, and with --only a large
measurement is made in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

import nibabel
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.data import DataLoader, Dataset, PersistentDataset
from monai.inferers import SimpleInferer, sliding_window_inference
from monai.networks.nets import SwinUNETR
from monai.transforms import Compose, LoadImaged, Orientationd, RandSpatialCropd, ScaleIntensityRanged

from custom.engine.config_check import check_patch_size
from custom.errors import BadInput
from custom.files import write_json
from custom.loss import DisruptiveLoss
from custom.masking import LocalMasking
from custom.network import disruptive_autoencoder
from custom.speed.blocks import fold_up_blocks, use_quick_norms
from custom.speed.cuda_graph import CUDAGraphInferer
from custom.speed.malloc import keep_freed_memory
from custom.text import markdown_table
from tools import phantom
from tools._cli import ROOT, tool

BUNDLE = ROOT / "bundles" / "dae_pretraining"
STOCK = "stock SwinUNETR, L1, float32"
DEFAULT = frozenset({"memory", "norm", "folding"})
# What is tried on a CPU and on a GPU: the parts of the bundle's step that are in use, and what is added to it.
STEPS = {
    "cpu": {
        STOCK: frozenset(),
        "with freed memory kept": frozenset({"memory"}),
        "and the quicker instance norm": frozenset({"memory", "norm"}),
        "and folded decoder stages: the bundle": DEFAULT,
        "the bundle, bfloat16 autocast": DEFAULT | {"bfloat16"},
        "the bundle, gradient checkpointing": DEFAULT | {"checkpointing"},
        "the bundle, channels last": DEFAULT | {"channels_last"},
    },
    "cuda": {
        STOCK: frozenset(),
        "with TF32 in convolutions, as torch comes": frozenset({"tf32"}),
        "and the quicker instance norm": frozenset({"tf32", "memory", "norm"}),
        "and folded decoder stages": frozenset({"tf32"}) | DEFAULT,
        "and bfloat16 autocast": frozenset({"tf32", "bfloat16"}) | DEFAULT,
        "and replayed, with fused AdamW: the bundle": frozenset({"tf32", "bfloat16", "replay"}) | DEFAULT,
        "the bundle, gradient checkpointing": frozenset({"tf32", "bfloat16", "replay", "checkpointing"}) | DEFAULT,
    },
}
GPU_STEPS = 10  # a step of a CPU takes seconds and is measured once, after one to warm up
INFERENCE = {
    "cpu": {STOCK: frozenset(), "the bundle": DEFAULT},
    "cuda": {STOCK: frozenset(), "the bundle": DEFAULT | {"bfloat16"}},
}
STOCK_DATA = "stock MONAI, .nii.gz"
DATA = (STOCK_DATA, ".nii.gz", "PersistentDataset", "CacheDataset", "store")
WAITING = (".nii.gz", "store")
PATIENCE = 30  # seconds, for the crops of one way, three times: to warm up, warm, cold
RATIOS = {
    "seconds": "times_as_fast",
    "cpu_seconds": "times_fewer_cpu_seconds",
    "cold_seconds": "times_as_fast_cold",
}


@cache
def device() -> torch.device:
    """Return what is measured; asked for in the processes alone, since a fork can't use a GPU that its parent has."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_mb() -> float:
    """Return the most memory that this process has held, on a GPU that of its tensors."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def seconds(work: Callable[[], Any]) -> dict[str, float]:
    """Return how long some work takes, on a GPU until it is done there, and how long processors were at it."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def medians(results: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each value."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def is_ours(parts: frozenset[str]) -> bool:
    """Return whether these parts are of the bundle's step, not of a stock one."""
    return "memory" in parts


def make_network(parts: frozenset[str], settings: dict[str, Any]) -> SwinUNETR:
    """Return a stock network, or that of the bundle with these parts of it."""
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "out_channels": 1, "feature_size": settings["feature_size"]}
    network = SwinUNETR(**sizes, use_checkpoint="checkpointing" in parts)
    if is_ours(parts):
        network = disruptive_autoencoder(network, masking=LocalMasking(0.6))
    for part, change in {"norm": use_quick_norms, "folding": fold_up_blocks}.items():
        if part in parts:
            network = change(network)
    network = network.to(device())
    return network.to(memory_format=torch.channels_last_3d) if "channels_last" in parts else network


def step(name: str, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Measure one training step, after one to warm up; on a GPU the median of some, after some."""
    parts, gpu = STEPS[device().type][name], device().type == "cuda"
    if is_ours(parts):
        keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = "tf32" in parts
    network = make_network(parts, settings).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=gpu and "replay" in parts)
    inferer = CUDAGraphInferer() if "replay" in parts else SimpleInferer()
    disruptive = DisruptiveLoss()
    image = torch.rand(settings["batch_size"], 1, *settings["patch_size"], device=device())
    target = {"image": image, "modality": torch.arange(len(image), device=device())}

    def work() -> None:
        optimizer.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled="bfloat16" in parts):
            output = inferer(image, network)
        loss = disruptive(output, target) if is_ours(parts) else F.l1_loss(output, image)
        loss.backward()
        optimizer.step()

    taken = [seconds(work) for _ in range(2 * GPU_STEPS if gpu else 2)]
    return medians(taken[len(taken) // 2 :]) | {"peak_mb": peak_mb()}


def inference(name: str, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Measure the sliding window over a volume, after one patch to warm up."""
    parts, patch = INFERENCE[device().type][name], settings["patch_size"]
    if is_ours(parts):
        keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = is_ours(parts)
    network = make_network(parts, settings).eval()
    volume = torch.rand(1, 1, *settings["volume"], device=device())
    with torch.inference_mode(), torch.autocast(device().type, torch.bfloat16, enabled="bfloat16" in parts):
        network(torch.rand(1, 1, *patch, device=device()))
        taken = seconds(lambda: sliding_window_inference(volume, patch, 1, network, overlap=0.5, mode="gaussian"))
    return taken | {"peak_mb": peak_mb()}


def training(settings: dict[str, Any], folder: Path, **overrides) -> ConfigWorkflow:
    """Return the bundle's training on the synthetic CT, ready to run."""
    values = {name: settings[name] for name in ("feature_size", "patch_size", "batch_size")}
    values |= {"datalist": str(folder / "list.json"), "bundle_root": str(BUNDLE), "resume": False}
    values |= {"output_dir": str(folder / "run"), "ckpt_dir": str(folder / "run"), **overrides}
    files = (str(BUNDLE / "configs" / f"{name}.json") for name in ("train", "metadata"))
    workflow = ConfigWorkflow(*files, None, workflow_type="train", **values)
    workflow.initialize()
    return workflow


def draw(settings: dict[str, Any], folder: Path) -> None:
    """Draw the synthetic CT, the middle of a cube each, list it, and put it into a store."""
    numbers = range(settings["volumes"] + 1)  # the last to validate
    scans = [{"image": str(folder / f"{subject}.nii.gz"), "modality": "ct"} for subject in numbers]
    for subject, scan in enumerate(scans):
        image, _, affine = phantom.abdomen_ct(subject, max(settings["volume"]))
        middle = tuple(slice((len(image) - side) // 2, (len(image) + side) // 2) for side in settings["volume"])
        nibabel.save(nibabel.Nifti1Image(image[middle], affine), scan["image"])
    (folder / "list.json").write_text(json.dumps({"training": scans[:-1], "validation": scans[-1:]}))
    (folder / "store").mkdir()
    parser = training(settings, folder, store=str(folder / "store"), cache_rate=0.0).parser
    stored = parser.get_parsed_content("loading")
    for side in ("train", "validate"):
        for item in parser.get_parsed_content(f"{side}#dataset#data"):
            stored.prepare(item)


def make_loader(name: str, settings: dict[str, Any], folder: Path) -> DataLoader:
    """Return a loader of random crops, one by one, by one of the ways to the data."""
    patch, crops = settings["patch_size"], 3 * settings["crops"]
    if name == STOCK_DATA:
        transform = Compose(
            [
                LoadImaged("image", ensure_channel_first=True),
                Orientationd("image", "RAS", labels=None),
                ScaleIntensityRanged("image", -1000, 1000, 0, 1, clip=True),
                RandSpatialCropd("image", patch, random_size=False),
            ]
        )
        return DataLoader(Dataset(json.loads((folder / "list.json").read_text())["training"] * crops, transform))
    keep_freed_memory()
    overrides = {"num_workers": 0, "batch_size": 1, "crops_per_volume": crops}
    overrides |= {"cache_rate": float(name != ".nii.gz"), "store": str(folder / "store") if name == "store" else None}
    parser = training(settings, folder, **overrides).parser
    if name == "PersistentDataset":
        transform, items = (parser.get_parsed_content(f"train#dataset#{id}") for id in ("transform", "data"))
        return DataLoader(PersistentDataset(items, transform, folder / "persistent"))
    return parser.get_parsed_content("train#dataloader")


def forget(folder: Path) -> None:
    """Have the system drop the files in a folder from its page cache, as far as nothing has them open."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def take(batches: Iterator, most: int, before: Callable[[], Any] = lambda: None) -> list[dict[str, float]]:
    """Measure one batch after the other, until there are most of them or `PATIENCE` is over."""
    found: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(found) < most and time.perf_counter() - start < PATIENCE:
        before()
        found.append(seconds(lambda: next(batches)))
    return found


def data(name: str, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Measure crops, preprocessed as in a training, after as many to warm up: a store's chunks are checked once."""
    torch.set_num_threads(1)  # as in a worker of a data loader
    batches, most = iter(make_loader(name, settings, folder)), settings["volumes"] * settings["crops"]
    take(batches, most)
    warm, cold = medians(take(batches, most)), medians(take(batches, most, lambda: forget(folder)))
    return warm | {"cold_seconds": cold["seconds"], "peak_mb": peak_mb()}


def waiting(name: str, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Train for an epoch, and measure how long the loop waits for batches, and what the 2 workers alone give."""
    store = str(folder / "store") if name == "store" else None
    overrides = {"num_workers": 2, "crops_per_volume": settings["crops"], "max_epochs": 1, "val_interval": 2}
    workflow = training(settings, folder, cache_rate=float(name == "store"), store=store, **overrides)
    trainer = workflow.parser.get_parsed_content("train#trainer")
    spent: dict[str, list[float]] = {"batch": [], "step": []}
    since = [0.0]

    def lap(kind: str) -> None:
        now = time.perf_counter()
        spent[kind].append(now - since[0])
        since[0] = now

    trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda: since.__setitem__(0, time.perf_counter()))
    trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda: lap("batch"))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: lap("step"))
    workflow.run()
    loader = workflow.parser.get_parsed_content("train#dataloader")
    loading = seconds(lambda: [None for _ in loader])["seconds"]
    # The first batch waits for the workers to start, once in a training.
    wait, work = sum(spent["batch"][1:]), sum(spent["step"][1:])
    return {
        "seconds": (wait + work) / (len(loader) - 1),
        "waiting_share": wait / (wait + work),
        "crops_per_second_of_the_loader": settings["batch_size"] * len(loader) / loading,
        "crops_per_second_of_the_step": settings["batch_size"] * (len(loader) - 1) / work,
    }


def apart(function: Callable, *args) -> Any:
    """Call a function in a fresh process."""
    context = get_context("forkserver")  # which has imported what takes seconds
    context.set_forkserver_preload(["custom.network", "monai.bundle", "monai.engines", "tools.phantom"])
    # A fork server hands its own way to start processes down to what it starts; a training's workers have the system's.
    with ProcessPoolExecutor(1, context, set_start_method, (None, True)) as pool:
        return pool.submit(function, *args).result()


def rounds(function: Callable, names: list[str], repeats: int, before: list[dict], *args) -> list[dict[str, Any]]:
    """Measure all names, one after the other, as often as asked, and return a row for each.

    Args:
        before: rows of an earlier run, whose rounds count too.

    Returns:
        rows of name, the rounds' values, their medians under the same names, and ratios (of the first row's median to
        this one).
    """
    found = {name: [] for name in names} | {row["name"]: row["rounds"] for row in before}
    for number in range(repeats):
        for name in names:
            found[name].append(apart(function, name, *args))
            print(f"{function.__name__} {number + 1}/{repeats}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    rows = [{"name": name, "rounds": results, **medians(results)} for name, results in found.items()]
    for row in rows:
        for name, ratio in RATIOS.items():
            if name in row:
                row[ratio] = rows[0][name] / row[name]
    return rows


def machine() -> dict[str, Any]:
    """Return what is measured on."""
    name = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    if device().type == "cuda":
        name = torch.cuda.get_device_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


SETTINGS = ("feature_size", "patch_size", "batch_size", "volume", "volumes", "crops")
KINDS = {
    "step": (step, STEPS, "Training step"),
    "data": (data, DATA, "A random crop"),
    "waiting": (waiting, WAITING, "An iteration, 2 workers"),
    "inference": (inference, INFERENCE, "Sliding window over a volume"),
}


def tables(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    about, settings = result["machine"], result["settings"]
    parts = [f"{about['device']}, {about['threads']} threads, torch {about['torch']}; " + json.dumps(settings)]
    for kind, (_, _, title) in KINDS.items():
        if rows := result.get(kind, []):
            values = [{key: value for key, value in row.items() if key not in ("name", "rounds")} for row in rows]
            header = [f"{title} (rounds: {len(rows[0]['rounds'])})", *(key.replace("_", " ") for key in values[0])]
            cells = (
                [row["name"], *(f"{x:#.3g}" for x in each.values())] for row, each in zip(rows, values, strict=True)
            )
            parts.append(markdown_table([header, *cells]))
    return "\n\n".join(parts)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and write.

    Raises:
        BadInput: for a patch that the network can't take, or a folder with values of other settings.
    """
    settings = {name: getattr(options, name) for name in SETTINGS}
    check_patch_size(options.patch_size)
    options.out.mkdir(parents=True, exist_ok=True)
    file, processor = options.out / "speed.json", apart(device).type
    result = {"machine": apart(machine), "settings": settings}
    if file.exists():
        before = json.loads(file.read_text())
        if {name: before[name] for name in result} != result:
            raise BadInput(f"{file} is of another machine or other settings; name another folder.")
        result = before
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if {"data", "waiting"} & set(options.only):
            apart(draw, settings, folder)
        for kind in options.only:
            function, names, _ = KINDS[kind]
            names = names[processor] if isinstance(names, dict) else names
            names = [n for n in names if options.bfloat16 or processor == "cuda" or "bfloat16" not in n]
            result[kind] = rounds(function, names, options.repeats, result.get(kind, []), settings, folder)
            write_json(file, result)
            (options.out / "speed.md").write_text(tables(result) + "\n")
    return result


def run(options: argparse.Namespace) -> None:
    """Measure, write and print."""
    print(tables(measure(options)))


def arguments(add: Callable) -> None:
    add("out", metavar="OUT", type=Path, help="folder to write to")
    add("--feature_size", type=int, default=24, metavar="N", help="of the network (%(default)s; published: 48)")
    add("--patch_size", type=int, nargs=3, default=[64] * 3, metavar="N", help="in voxels (64 64 64; published: 96)")
    add("--batch_size", type=int, default=1, metavar="N", help="(%(default)s)")
    add("--volume", type=int, nargs=3, default=[128] * 3, metavar="N", help="sides in voxels (128 128 128)")
    add("--volumes", type=int, default=3, metavar="N", help="how many (%(default)s)")
    add("--crops", type=int, default=4, metavar="N", help="of each volume, at most half a minute of them (%(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds (%(default)s)")
    add("--bfloat16", action="store_true", help="try it on a CPU too; emulated, a step takes many times as long")
    add("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="WHAT", help=f"some of {', '.join(KINDS)}")


main = tool("studies.speed", __doc__, arguments, run)

if __name__ == "__main__":
    sys.exit(main())
