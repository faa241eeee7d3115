"""The trainings of a benchmark: each is a run of a bundle in a folder of its own, and is run once."""

import csv
import fcntl
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from custom.errors import BadInput
from custom.files import read_json, write_json
from tools._cli import ROOT
from tools.benchmark.task import BUNDLES, PRETRAININGS, config_of

VALIDATIONS = 4  # in a fine-tuning, at the most: the points of its learning curve
# Of the checkpoints that are validated the last is kept, so that all methods train equally long and no case chooses.
LAST = {"best_checkpoint#score_function": "$lambda evaluator: evaluator.state.epoch"}
RECORD = "benchmark.json"  # in a run's folder: its command, and the seconds that it took once it has finished


class Run(NamedTuple):
    """A fine-tuning: what it starts from, how many labelled cases and iterations it has, its seed."""

    method: str
    labelled: int
    iterations: int
    seed: int

    def folder(self, out: Path) -> Path:
        length = f"{self.labelled} labels, {self.iterations} iterations"
        return out / "finetuning" / slug(self.method) / length / f"seed {self.seed}"


class Result(NamedTuple):
    """What a fine-tuning came to: mean foreground Dice of each case, and validation Dice by iteration."""

    run: Run
    dice: dict[str, float]
    curve: dict[int, float]
    seconds: float
    cpu_seconds: float


def slug(method: str) -> str:
    """Return a method's name as that of a folder."""
    return method.replace(", ", " ").replace(" ", "_")


def command(bundle: str, configs: Sequence[str], **overrides: Any) -> list[str]:
    """Return the command that runs configs of a bundle."""
    folder = BUNDLES / bundle
    files = [str(folder / f"configs/{name}.json") for name in configs]
    arguments = {"config_file": str(files), "bundle_root": folder, "num_workers": 0, **overrides}
    return [
        "-m",
        "monai.bundle",
        "run",
        *(part for name, value in arguments.items() for part in (f"--{name}", str(value))),
    ]


def sides(task: dict) -> dict[str, bool]:
    """Return what lets the training cases be validated, where a task has no others to validate."""
    names = [f"{section}#dataset#data#apart" for section in ("train", "validate")]
    return {} if task["validation_folds"] else dict.fromkeys(names, False)


def pretraining(task: dict, method: str, out: Path) -> tuple[Path, list[str]]:
    """Return folder and command of a pre-training."""
    folder = out / "pretraining" / slug(method)
    part = task["pretraining"]
    return folder, command(
        part["bundle"],
        ["train", *part.get("configs", [])],
        datalist=out / "pretraining.json",
        output_dir=folder,
        ckpt_dir=folder / "models",
        max_iterations=part["iterations"],
        **{**LAST, **sides(task), **part["overrides"], **PRETRAININGS[method]},
    )


def start_of(task: dict, method: str, out: Path) -> dict[str, Any]:
    """Return what lets a fine-tuning start from the weights of a method; nothing for one from scratch."""
    given = task["weights"].get(method)
    if given is None and method in PRETRAININGS:
        given = pretraining(task, method, out)[0] / "models/model.pt"
    return {} if given is None else {"pretrained": given}


def finetuning(task: dict, run: Run, out: Path) -> tuple[Path, list[str]]:
    """Return folder and command of a fine-tuning; those of two methods differ in `pretrained` alone."""
    part, folder, cases = task["finetuning"], run.folder(out), len(task["finetuning"]["datalist"]["training"])
    epochs = math.ceil(run.iterations / math.ceil(run.labelled / config_of(part)["batch_size"]))
    interval = math.ceil(epochs / VALIDATIONS)
    return folder, command(
        part["bundle"],
        ["train", *part.get("configs", [])],
        datalist=out / "finetuning.json",
        output_dir=folder,
        ckpt_dir=folder / "models",
        max_epochs=interval * math.ceil(epochs / interval),  # so that the last weights are validated, and kept
        val_interval=interval,
        label_fraction=run.labelled / cases,
        seed=run.seed,
        **{"val_pictures": 0, **LAST, **sides(task), **part["overrides"]},
        **start_of(task, run.method, out),
    )


def evaluation(task: dict, run: Run, section: str, out: Path) -> tuple[Path, list[str]]:
    """Return folder and command of the evaluation of a fine-tuning."""
    part, folder = task["finetuning"], run.folder(out) / section
    return folder, command(
        part["bundle"],
        ["train", *part.get("configs", []), "evaluate"],
        datalist=out / "finetuning.json",
        output_dir=folder,
        ckpt_dir=run.folder(out) / "models",
        seed=run.seed,
        **{"validate#dataset#data#section": section, "val_pictures": 1, **part["overrides"]},
    )


def rival(task: dict, run: Run, section: str, out: Path, python: Path) -> tuple[Path, list[str]]:
    """Return folder and command of nnU-Net, which trains as long as the fine-tuning from scratch of `run` has taken.

    Raises:
        BadInput: where that is not known.
    """
    part, folder = task["finetuning"], run.folder(out)
    record = run._replace(method="scratch").folder(out) / RECORD
    seconds = read_json(record).get("seconds" if torch.cuda.is_available() else "cpu_seconds")
    if seconds is None:
        raise BadInput(f"{record} does not say how much CPU time it took; give another OUT.")
    config = config_of(part)
    fraction = run.labelled / len(part["datalist"]["training"])
    arguments = {"modality": config["modality"], "section": section, "fraction": fraction, "seed": run.seed}
    options = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    command = [str(python.absolute()), "-W", "ignore", str(ROOT / "tools"), "nnunet"]
    command += [str(out / "finetuning.json"), str(folder)]
    return folder, [*command, *options, "--seconds", f"{seconds:.0f}", "--labels", *config["labels"]]


def seconds_of(folder: Path, arguments: list[str]) -> float | None:
    """Return the seconds that a finished command took, None for one that has not finished.

    Raises:
        BadInput: for a folder that another command has written to.
    """
    if not (folder / RECORD).is_file():
        return None
    known = read_json(folder / RECORD)
    if known["command"] != arguments:
        raise BadInput(f"{folder} is of another task or recipe, see its {RECORD}; give another OUT.")
    return known["seconds"]


def finish(folder: Path, arguments: list[str], threads: int) -> None:
    """Run a command unless it has finished.

    Raises:
        BadInput: for a command that fails, with what it said.
    """
    if seconds_of(folder, arguments) is not None:
        return drop_states(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record, log = folder / RECORD, folder / "log.txt"
    record.write_text(json.dumps({"command": arguments, "seconds": None}, indent=4))
    started = time.monotonic()
    with log.open("a") as stream:
        # Held by the run too: one that outlives a killed benchmark is waited for, not met in its folder.
        fcntl.flock(stream, fcntl.LOCK_EX)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = arguments if os.path.isabs(arguments[0]) else [sys.executable, *arguments]
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        _, status, usage = os.wait4(process.pid, 0)  # with what its own processes took
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BadInput(f"A run has failed, see {log}: {''.join(log.read_text().strip().splitlines()[-1:])}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    write_json(record, {"command": arguments, "seconds": time.monotonic() - started, "cpu_seconds": cpu_seconds})
    drop_states(folder)


def drop_states(folder: Path) -> None:
    """Remove the checkpoints of a finished run: nothing goes on from them, and they are most of the folder."""
    for state in folder.glob("checkpoint_*.pt"):
        state.unlink()


def seconds_per_iteration(part: dict) -> float:
    """Measure a training step of the pre-training or the fine-tuning of a task."""
    config = config_of(part)
    network = config.get_parsed_content("network")  # on the device that the runs will take
    first = next(network.parameters())
    crops = config["batch_size"] * (1 if "disruptions" in config else config["crops_per_volume"])
    image = torch.rand(crops, config.get("in_channels", 1), *config["patch_size"], device=first.device)
    for _ in range(2):  # the first is slower
        started = time.monotonic()
        output = network(image)  # of a pre-training with the features beside it
        (output[0] if isinstance(output, tuple) else output).mean().backward()
        first.grad.sum().item()  # a GPU is done when this is
    return time.monotonic() - started


def results(task: dict, runs: Sequence[Run], section: str, out: Path) -> Iterator[Result]:
    """Yield what the finished runs came to.

    Raises:
        BadInput: where no case has a class.
    """
    for run in runs:
        folder = run.folder(out)
        with (evaluation(task, run, section, out)[0] / "evaluation/val_mean_dice_raw.csv").open() as file:
            means = {row["filename"]: float(row["mean"]) for row in csv.DictReader(file)}
        dice = {
            case: mean for case, mean in means.items() if math.isfinite(mean)
        }  # an empty label map measures nothing
        if not dice:
            raise BadInput(f"No label map of the cases for {section} has any class; give other folds.")
        log = folder / "metrics.jsonl"  # nnU-Net has none
        lines = map(json.loads, log.read_text().splitlines() if log.is_file() else [])
        curve = {line["iteration"]: line["val_mean_dice"] for line in lines if "val_mean_dice" in line}
        record = read_json(folder / RECORD)
        yield Result(run, dice, curve, record["seconds"], record.get("cpu_seconds", math.nan))
