"""Measure how fast this machine trains, and what each part of it costs or saves.

    python -m tools.speed OUT --feature_size 48 --patch_size 96 96 96 --volume 192

Four measurements, each on synthetic CT drawn for it: the training step of each precision and option; crops per second
of each way to the data; a real training's iterations and the share of them that is waiting for data; sliding-window
inference of a whole volume. Everything is measured in a fresh process of its own, whose peak memory is its own, and in
rounds, A B C A B C, so that what else happens on the machine meets all alike. CPU seconds are those of the process's
threads, and say more where the machine is not idle. Ratios are of medians, to the first row; seconds of one run can be
compared with each other, not with those of another machine. Written to OUT: speed.json, speed.md. The same command adds
rounds to what is there, and with --only a large measurement is made in pieces.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.data import PersistentDataset
from monai.inferers import sliding_window_inference
from monai.networks.blocks import UnetrUpBlock
from monai.networks.nets import SwinUNETR
from torch import nn

from custom.errors import BadInput
from custom.loss import DisruptiveLoss
from custom.network import DisruptiveAutoencoder, FoldedUpBlock, InstanceNorm
from custom.workflow import begin, check_patch_size
from tools import phantom

BUNDLE = Path(__file__).parents[1] / "bundles" / "dae_pretraining"
STOCK = "stock SwinUNETR, L1, float32"
DEFAULT = frozenset({"begin", "norm", "folding"})
# What is tried: the parts of the bundle's step that are in use, and what is added to it.
STEPS = {
    STOCK: frozenset(),
    "with freed memory kept": frozenset({"begin"}),
    "and the quicker instance norm": frozenset({"begin", "norm"}),
    "and folded decoder stages: the bundle": DEFAULT,
    "the bundle, bfloat16 autocast": DEFAULT | {"bfloat16"},
    "the bundle, gradient checkpointing": DEFAULT | {"checkpointing"},
    "the bundle, channels last": DEFAULT | {"channels_last"},
}
INFERENCE = {STOCK: frozenset(), "the bundle": DEFAULT}
DATA = (".nii.gz", "PersistentDataset", "CacheDataset", "store")
WAITING = (".nii.gz", "store")


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
    """Return the median of each figure."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def make_network(parts: frozenset[str], settings: dict[str, Any]) -> SwinUNETR:
    """Return a stock network for no parts, else that of the bundle with these parts of it."""
    torch.manual_seed(0)
    sizes = {"in_channels": 1, "out_channels": 1, "feature_size": settings["feature_size"]}
    if not parts:
        return SwinUNETR(**sizes).to(device())
    network = DisruptiveAutoencoder(**sizes, use_checkpoint="checkpointing" in parts).to(device())
    for module in network.modules():
        if isinstance(module, InstanceNorm) and "norm" not in parts:
            module.__class__ = nn.InstanceNorm3d
        if isinstance(module, FoldedUpBlock) and "folding" not in parts:
            module.__class__ = UnetrUpBlock
    return network.to(memory_format=torch.channels_last_3d) if "channels_last" in parts else network


def step(name: str, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Measure one training step, after one to warm up."""
    parts = STEPS[name]
    if "begin" in parts:
        begin(settings["patch_size"])
    network = make_network(parts, settings).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    disruptive = DisruptiveLoss()
    image = torch.rand(settings["batch_size"], 1, *settings["patch_size"], device=device())
    target = {"image": image, "modality": torch.arange(len(image), device=device())}

    def work() -> None:
        optimizer.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled="bfloat16" in parts):
            output = network(image, return_embedding=True) if parts else network(image)
        loss = disruptive(output, target) if parts else F.l1_loss(output, image)
        loss.backward()
        optimizer.step()

    work()
    return seconds(work) | {"peak_mb": peak_mb()}


def inference(name: str, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Measure the sliding window over a cube, after one patch to warm up."""
    parts, patch = INFERENCE[name], settings["patch_size"]
    if parts:
        begin(patch)
    network = make_network(parts, settings).eval()
    volume = torch.rand(1, 1, *[settings["volume"]] * 3, device=device())
    with torch.inference_mode():
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
    """Draw the synthetic CT, list it, and put it into a store."""
    phantom.write(folder, subjects=settings["volumes"], shape=settings["volume"], kinds=("ct",))
    scans = [{"image": str(path), "modality": "ct"} for path in sorted(folder.glob("ct/images/*"))]
    (folder / "list.json").write_text(json.dumps({"training": scans, "validation": scans[:1]}))
    (folder / "store").mkdir()
    parser = training(settings, folder, store=str(folder / "store"), cache_rate=0.0).parser
    stored = parser.get_parsed_content("train#preprocessing").transforms[0]
    for item in parser.get_parsed_content("train#dataset#data"):
        stored.prepare(item)


def data(name: str, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Measure crops, preprocessed as in a training, after one of each volume to warm up."""
    store = str(folder / "store") if name == "store" else None
    cached = float(name in ("CacheDataset", "store"))
    parser = training(settings, folder, num_workers=0, cache_rate=cached, store=store).parser
    if name == "PersistentDataset":
        transform, items = (parser.get_parsed_content(f"train#dataset#{id}") for id in ("transform", "data"))
        dataset, keys = PersistentDataset(items, transform, folder / "persistent"), range(settings["volumes"])
    else:
        dataset = parser.get_parsed_content("train#dataset")
        keys = [(0, index) for index in range(settings["volumes"])]
    for key in keys:
        dataset[key]
    taken = [seconds(lambda key=key: dataset[key]) for key in keys for _ in range(settings["crops"])]
    return medians(taken) | {"peak_mb": peak_mb()}


def waiting(name: str, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Train for an epoch, and measure how long the loop waits for batches, and what the 2 workers alone give."""
    store = str(folder / "store") if name == "store" else None
    overrides = {"num_workers": 2, "crops_per_volume": settings["crops"], "max_epochs": 1, "val_interval": 2}
    workflow = training(settings, folder, cache_rate=float(name == "store"), store=store, **overrides)
    trainer, spent = workflow.parser.get_parsed_content("train#trainer"), {"batch": [], "step": []}
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
        rows of name, the rounds' figures, their medians under the same names, and ratios (of the first row's median to
        this one).
    """
    found = {name: [] for name in names} | {row["name"]: row["rounds"] for row in before}
    for number in range(repeats):
        for name in names:
            found[name].append(apart(function, name, *args))
            print(f"{function.__name__} {number + 1}/{repeats}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    rows = [{"name": name, "rounds": results, **medians(results)} for name, results in found.items()]
    for row in rows:
        row["times_as_fast"] = rows[0]["seconds"] / row["seconds"]
        if "cpu_seconds" in row:
            row["times_fewer_cpu_seconds"] = rows[0]["cpu_seconds"] / row["cpu_seconds"]
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
    lines = [f"{about['device']}, {about['threads']} threads, torch {about['torch']}; " + json.dumps(settings)]
    for kind, (_, _, title) in KINDS.items():
        rows = result.get(kind, [])
        for row in rows:
            figures = {name: value for name, value in row.items() if name not in ("name", "rounds")}
            if row is rows[0]:
                header = [f"{title} (rounds: {len(row['rounds'])})", *figures]
                lines += ["", f"| {' | '.join(header).replace('_', ' ')} |", "|---" * len(header) + "|"]
            lines.append(f"| {' | '.join([row['name'], *(f'{value:#.3g}' for value in figures.values())])} |")
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and write.

    Raises:
        BadInput: for a patch that the network can't take, or a folder with figures of other settings.
    """
    settings = {name: getattr(options, name) for name in SETTINGS}
    check_patch_size(options.patch_size)
    options.out.mkdir(parents=True, exist_ok=True)
    file, result = options.out / "speed.json", {"machine": apart(machine), "settings": settings}
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
            names = [name for name in names if options.bfloat16 or "bfloat16" not in name]
            result[kind] = rounds(function, names, options.repeats, result.get(kind, []), settings, folder)
            file.write_text(json.dumps(result, indent=2) + "\n")
            (options.out / "speed.md").write_text(tables(result) + "\n")
    print(tables(result))
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 (one sentence on stderr says why)."""
    about, _, usage = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.speed",
        description=about,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("out", metavar="OUT", type=Path, help="folder to write to")
    add("--feature_size", type=int, default=24, metavar="N", help="of the network (%(default)s; published: 48)")
    add("--patch_size", type=int, nargs=3, default=[64] * 3, metavar="N", help="in voxels (64 64 64; published: 96)")
    add("--batch_size", type=int, default=1, metavar="N", help="(%(default)s)")
    add("--volume", type=int, default=128, metavar="N", help="side of a volume in voxels (%(default)s)")
    add("--volumes", type=int, default=3, metavar="N", help="how many (%(default)s)")
    add("--crops", type=int, default=4, metavar="N", help="of each volume and round (%(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds (%(default)s)")
    add("--bfloat16", action="store_true", help="try it too; on a CPU without it a step takes many times as long")
    add("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="WHAT", help=f"some of {', '.join(KINDS)}")
    try:
        run(parser.parse_args(argv))
    except BadInput as error:
        print(f"speed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
