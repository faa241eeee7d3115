"""Kill trainings at random moments, start them again by the same command, and compare with ones that were not killed.

    python -m tools.studies.kills OUT_DIR

Trains the smallest networks on phantoms for a few minutes: a pre-training from a store, a fine-tuning from it, and a
pre-training of a residual-encoder U-Net by two processes of torchrun. Needs Linux. A folder that was used before is
used anew.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from custom.text import markdown_table
from tools import datalist, phantom, prepare
from tools._cli import ROOT, tool

BUNDLES = ROOT / "bundles"
SMALL = {"feature_size": 12, "patch_size": [64, 32, 32], "batch_size": 1, "crops_per_volume": 1, "val_pictures": 0}
MOMENTS = ("training", "saving", "told to stop", "starting")
RESULTS = ("weights", "state", "metrics", "TensorBoard")
SECONDS = 1800  # that a moment to kill at may be away, and that a run may take to stop when told to


@dataclass(frozen=True)
class Run:
    """A training that can be started again and again.

    Args:
        bundle: name of its folder.
        overrides: of the command line, beside SMALL.
        configs: names of its files.
        launcher: what runs `monai.bundle`.
    """

    bundle: str
    overrides: Mapping[str, Any]
    configs: Sequence[str] = ("train",)
    launcher: Sequence[str] = (sys.executable,)

    def start(self, folder: Path) -> subprocess.Popen:
        """Start it in a folder, or start it again; what it says is added to a log beside that."""
        root = BUNDLES / self.bundle
        files = [str(root / "configs" / f"{name}.json") for name in self.configs]
        command = [*self.launcher, "-m", "monai.bundle", "run", "--config_file", str(files), "--bundle_root", str(root)]
        overrides = {"output_dir": folder, "ckpt_dir": folder / "models", **SMALL, **self.overrides}
        command += [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
        with open(folder.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(command, cwd=root, stdout=log, stderr=log)

    def finish(self, folder: Path) -> None:
        """Start it and wait for its end.

        Raises:
            RuntimeError: when it fails.
        """
        check_end(self.start(folder), folder)


def check_end(process: subprocess.Popen, folder: Path) -> None:
    """Wait for the end of a run; raise `RuntimeError` with the end of its log when it fails."""
    if process.wait():
        log = folder.with_suffix(".log")
        raise RuntimeError(f"The run has failed; see {log}, which ends in:\n{log.read_text(errors='replace')[-5000:]}")


def processes(folder: Path) -> list[int]:
    """Return the ids of all processes of a run; torchrun's are in sessions of their own, so there is no group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in entry.read_bytes().split(b"\0"):
                found.append(int(entry.parent.name))
    return found


def send(number: int, folder: Path) -> None:
    """Send a signal to all processes of a run."""
    for process in processes(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def wait(until: Callable[[], Any], process: subprocess.Popen) -> bool:
    """Wait until something is so; False when the process has ended before.

    Raises:
        RuntimeError: when it takes too long.
    """
    end = time.monotonic() + SECONDS
    while not until():
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            raise RuntimeError(f"Nothing happens for {SECONDS} s: {process.args!r}")
        time.sleep(0.001)
    return True


def kill(run: Run, folder: Path, moment: str, random: np.random.Generator, start_s: float, train_s: float) -> bool:
    """Start a run and kill it at a moment; False when it has ended before.

    Args:
        run: to start.
        folder: of the run.
        moment: one of MOMENTS. When told to stop, all processes get a SIGTERM, as from a scheduler; else a SIGKILL.
        random: for the time between the beginning of the moment and the signal.
        start_s: seconds that a start takes.
        train_s: seconds of training to kill it in.
    """
    record = folder / "run.json"  # written anew when a start is over
    before = record.stat().st_mtime_ns if record.exists() else 0
    process = run.start(folder)
    if moment == "starting":
        ready, delay_s = True, random.uniform(0, start_s)
    else:
        ready = wait(lambda: record.exists() and record.stat().st_mtime_ns != before, process)
        delay_s = random.uniform(0, train_s)
    if moment == "saving":
        ready, delay_s = wait(lambda: any(folder.rglob("*.pt.part")), process), 0
    if ready:
        ready = not wait_for_end(process, delay_s)
    if moment == "told to stop":
        send(signal.SIGTERM, folder)
        process.wait(SECONDS)
    while processes(folder):  # one may have been started meanwhile
        send(signal.SIGKILL, folder)
        process.poll()
        time.sleep(0.01)
    process.wait()
    return ready


def wait_for_end(process: subprocess.Popen, seconds: float) -> bool:
    """Wait some time; True when the process has ended meanwhile."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.poll() is not None


def equal(one: Any, other: Any) -> bool:
    """Whether two states are the same to the bit."""
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def results(folder: Path) -> dict[str, Any]:
    """Return what a run leaves: weights, the state to go on from, metrics, and TensorBoard's scalars."""
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    last = max(folder.glob("checkpoint_*.pt"), key=lambda file: int(file.stem.split("=")[1]))
    return {
        "weights": torch.load(folder / "models" / "model.pt", weights_only=True),
        "state": torch.load(last, weights_only=True),
        "metrics": (folder / "metrics.jsonl").read_text(),
        "TensorBoard": {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
        },
    }


def compare(run: Run, folder: Path, kills: int, random: np.random.Generator) -> tuple[dict, dict]:
    """Train once without and once with kills.

    Args:
        run: the training.
        folder: to write to.
        kills: how often it is killed.
        random: for the moments.

    Returns:
        number of kills at each of MOMENTS, and whether each of `results` is the same.
    """
    epochs = kills + 3  # enough to be killed in
    run = replace(run, overrides={**run.overrides, "max_epochs": epochs})
    shutil.rmtree(folder, ignore_errors=True)
    whole, killed = folder / "whole", folder / "killed"
    folder.mkdir(parents=True)
    begun = time.monotonic()
    process = run.start(whole)
    wait((whole / "run.json").exists, process)
    start_s = time.monotonic() - begun
    check_end(process, whole)
    epoch_s = (time.monotonic() - begun - start_s) / epochs
    moments = random.permutation(np.resize(MOMENTS, kills)).tolist()
    made = Counter(
        moment
        for moment in tqdm(moments, folder.name, unit="kill", disable=None)
        if kill(run, killed, moment, random, start_s, epoch_s)
    )
    run.finish(killed)
    one, other = results(whole), results(killed)
    return {moment: made[moment] for moment in MOMENTS}, {name: equal(one[name], other[name]) for name in RESULTS}


def arguments(add: Callable) -> None:
    add("out_dir", type=Path, metavar="OUT_DIR", help="folder to write to")
    add("--pretraining", type=int, default=20, metavar="N", help="kills of a pre-training (%(default)s); 0: none")
    add("--finetuning", type=int, default=5, metavar="N", help="kills of a fine-tuning, from it if there is one (5)")
    add("--torchrun", type=int, default=5, metavar="N", help="kills of a run of two processes (%(default)s)")
    add("--seed", type=int, default=0, help="of the moments (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Kill, compare and print; return 1 when a run that was killed has ended otherwise than one that was not."""
    out = options.out_dir.absolute()
    phantom.write(out / "phantoms", subjects=4, shape=40, kinds=("fetal",))
    scans = out / "phantoms" / "scans.json"
    source = [f"t2={out / 'phantoms/fetal/images'}", "--labels", "images=labels", "--validation", "0.25"]
    if datalist.main([str(scans), *source]):
        raise RuntimeError("The data list of the phantoms could not be made.")
    if prepare.main([str(scans), str(out / "store"), "--bundle", str(BUNDLES / "dae_pretraining")]):
        raise RuntimeError("The store of the phantoms could not be made.")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    pretraining = {"datalist": scans, "val_interval": 2, "warmup_iterations": 3, "num_workers": 0}
    resenc = {"feature_size": 4, "network_def#network#n_blocks_per_stage": [1] * 6}
    swin = {"network_def#network#window_size": 4, "num_workers": 1, "store": out / "store"}
    finetuning = {"datalist": scans, "val_interval": 2, "num_workers": 1, "network_def#window_size": 4}
    if options.pretraining:
        finetuning["pretrained"] = out / "pretraining" / "whole" / "models" / "model.pt"
    runs = {
        "pretraining": Run("dae_pretraining", {**pretraining, **swin}),
        "finetuning": Run("feta_mri_segmentation", finetuning),
        "torchrun": Run("dae_pretraining", {**pretraining, **resenc}, ("train", "resenc", "multi_gpu_train"), torchrun),
    }
    random = np.random.default_rng(options.seed)
    rows, fine = [["killed while", *MOMENTS, *RESULTS]], True
    for name, run in runs.items():
        kills = getattr(options, name)
        if not kills:
            continue
        made, same = compare(run, out / name, kills, random)
        rows.append([name, *made.values(), *("same" if equal else "**other**" for equal in same.values())])
        print(f"\n{markdown_table(rows)}", flush=True)
        fine &= sum(made.values()) == kills and all(same.values())
    print("\nAll have ended as if they had not been killed." if fine else f"\nNot all is as it should be: see {out}.")
    return int(not fine)


main = tool("studies.kills", __doc__, arguments, run)

if __name__ == "__main__":
    sys.exit(main())
