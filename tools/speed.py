"""Measure how fast this machine trains, and what each part of it costs or saves.

    python -m tools.speed OUT --feature_size 48 --patch_size 96 96 96 --volume 192

Four measurements, each on synthetic CT drawn for it: the training step of each precision and option; crops per second
of each way to the data; the share of a real training that waits for data; sliding-window inference of a whole volume.
Everything is measured in a fresh process of its own, whose peak memory is its own, and in rounds, A B C A B C, so that
what else happens on the machine meets all alike. CPU seconds are those of the process's threads, and say more where the
machine is not idle. Ratios are of medians, to the first row; seconds of one run can be compared with each other, not
with those of another machine. Written to OUT: speed.json, speed.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
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
DATA = (".nii.gz", "PersistentDataset", "CacheDataset")


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
    begin(settings["patch_size"])
    network = DisruptiveAutoencoder(**sizes, use_checkpoint="checkpointing" in parts).to(device())
    for module in network.modules():
        if isinstance(module, InstanceNorm) and "norm" not in parts:
            module.__class__ = nn.InstanceNorm3d
        if isinstance(module, FoldedUpBlock) and "folding" not in parts:
            module.__class__ = UnetrUpBlock
    return network.to(memory_format=torch.channels_last_3d) if "channels_last" in parts else network


def step(name: str, settings: dict[str, Any]) -> dict[str, float]:
    """Measure one training step, after one to warm up."""
    parts = STEPS[name]
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


def inference(name: str, settings: dict[str, Any]) -> dict[str, float]:
    """Measure the sliding window over a cube, after one patch to warm up."""
    network = make_network(INFERENCE[name], settings).eval()
    volume = torch.rand(1, 1, *[settings["volume"]] * 3, device=device())
    patch = settings["patch_size"]
    with torch.inference_mode():
        network(volume[..., : patch[0], : patch[1], : patch[2]])
        taken = seconds(lambda: sliding_window_inference(volume, patch, 1, network, overlap=0.5, mode="gaussian"))
    return taken | {"peak_mb": peak_mb()}


def training(settings: dict[str, Any], folder: Path, **overrides) -> ConfigWorkflow:
    """Return the bundle's training on the synthetic CT, ready to run."""
    values = {name: settings[name] for name in ("feature_size", "patch_size", "batch_size")}
    values |= {
        "datalist": str(folder / "list.json"),
        "output_dir": str(folder / "run"),
        "ckpt_dir": str(folder / "run"),
    }
    values |= {"bundle_root": str(BUNDLE), "resume": False, **overrides}
    config = BUNDLE / "configs" / "train.json"
    workflow = ConfigWorkflow(
        str(config), str(BUNDLE / "configs" / "metadata.json"), None, workflow_type="train", **values
    )
    workflow.initialize()
    return workflow


def data(name: str, settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Measure crops, preprocessed and disrupted as in a training, after one of each volume to warm up."""
    parser = training(settings, folder, num_workers=0, cache_rate=float(name == "CacheDataset")).parser
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


def waiting(settings: dict[str, Any], folder: Path) -> dict[str, float]:
    """Train, and measure how long the loop waits for batches, and what the loader alone gives."""
    overrides = {"num_workers": 2, "crops_per_volume": settings["crops"], "max_epochs": 1, "warmup_iterations": 1}
    workflow = training(settings, folder, cache_rate=0.0, **overrides)
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
    crops = settings["batch_size"] * len(loader)
    return {
        "iterations": len(spent["step"]),
        "waiting_share": wait / (wait + work),
        "step_seconds": statistics.median(spent["step"]),
        "loader_crops_per_second": crops / loading,
        "step_crops_per_second": settings["batch_size"] / statistics.median(spent["step"]),
    }


def apart(function: Callable, *args) -> Any:
    """Call a function in a fresh process."""
    context = get_context("forkserver")  # which has imported what takes seconds
    context.set_forkserver_preload(["tools.speed"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def rounds(function: Callable, names: list[str], repeats: int, *args) -> list[dict[str, Any]]:
    """Measure all names, one after the other, as often as asked, and return a row for each.

    Returns:
        rows of name, the rounds' figures, their medians under the same names, and ratios (of the first row's median to
        this one).
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(repeats):
        for name in names:
            found[name].append(apart(function, name, *args))
            print(f"{function.__name__} {number + 1}/{repeats}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    rows = [{"name": name, "rounds": results, **medians(results)} for name, results in found.items()]
    for row in rows:
        row["ratio"] = rows[0]["seconds"] / row["seconds"]
        row["cpu_ratio"] = rows[0]["cpu_seconds"] / row["cpu_seconds"]
    return rows


def machine() -> dict[str, Any]:
    """Return what is measured on."""
    name = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    if device().type == "cuda":
        name = torch.cuda.get_device_name()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def tables(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    about = result["machine"]
    lines = [f"{about['device']}, {about['threads']} threads, torch {about['torch']}: `{result['command']}`"]
    titles = {"step": "Training step", "data": "A random crop", "inference": "Sliding window over a volume"}
    for key, title in titles.items():
        if key in result:
            lines += [
                "",
                f"| {title} | seconds | times as fast | CPU seconds | times fewer | peak MB |",
                "|---" * 6 + "|",
            ]
            for row in result[key]:
                lines.append(
                    f"| {row['name']} | {row['seconds']:.3g} | {row['ratio']:.2f} | {row['cpu_seconds']:.3g} | "
                    f"{row['cpu_ratio']:.2f} | {row['peak_mb']:.0f} |"
                )
    if "waiting" in result:
        found = result["waiting"]
        lines += ["", "| Training, 2 workers, nothing cached | |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in found.items()]
    return "\n".join(lines)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and write."""
    settings = {name: getattr(options, name) for name in ("feature_size", "patch_size", "batch_size", "volume")}
    settings |= {"volumes": options.volumes, "crops": options.crops}
    check_patch_size(options.patch_size)
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": apart(machine), "settings": settings}
    result["command"] = "python -m tools.speed " + shlex.join(sys.argv[1:])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if {"data", "waiting"} & set(options.only):
            phantom.write(folder, subjects=options.volumes, shape=options.volume, kinds=("ct",))
            scans = [{"image": str(path), "modality": "ct"} for path in sorted(folder.glob("ct/images/*"))]
            (folder / "list.json").write_text(json.dumps({"training": scans, "validation": scans[:1]}))
        for name in options.only:
            if name == "step":
                chosen = [key for key in STEPS if options.bfloat16 or "bfloat16" not in STEPS[key]]
                result[name] = rounds(step, chosen, options.repeats, settings)
            elif name == "data":
                result[name] = rounds(data, list(DATA), options.repeats, settings, folder)
            elif name == "inference":
                result[name] = rounds(inference, list(INFERENCE), options.repeats, settings)
            else:
                result[name] = apart(waiting, settings, folder)
    (options.out / "speed.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "speed.md").write_text(tables(result) + "\n")
    print(tables(result))
    return result


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    about, _, usage = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m tools.speed",
        description=about,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, kinds = parser.add_argument, ["step", "data", "waiting", "inference"]
    add("out", metavar="OUT", type=Path, help="folder to write to")
    add("--feature_size", type=int, default=24, metavar="N", help="of the network (%(default)s; published: 48)")
    add("--patch_size", type=int, nargs=3, default=[64] * 3, metavar="N", help="in voxels (64 64 64; published: 96)")
    add("--batch_size", type=int, default=1, metavar="N", help="(%(default)s)")
    add("--volume", type=int, default=128, metavar="N", help="side of a volume in voxels (%(default)s)")
    add("--volumes", type=int, default=3, metavar="N", help="how many (%(default)s)")
    add("--crops", type=int, default=4, metavar="N", help="of each volume and round (%(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="rounds (%(default)s)")
    add("--bfloat16", action="store_true", help="try it too; on a CPU without it a step takes many times as long")
    add("--only", nargs="+", choices=kinds, default=kinds, metavar="WHAT", help=f"some of {', '.join(kinds)}")
    run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
