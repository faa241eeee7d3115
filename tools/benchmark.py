"""Measure whether pre-training helps: fine-tune with few labels from several pre-trainings, and from scratch.

    python -m tools.benchmark TASK.json OUT [--section testing] [--methods scratch DAE] [--counts 4] [--seeds 0 1]

It only runs the bundles, each run in a folder of its own in OUT. Interrupted, the same command goes on, and what was
finished is not run again. Written to OUT: runs.csv (a row a run), table.md (mean, standard deviation, paired tests),
dice_over_labels.png, learning_curves.png. Choose recipes by the validation cases, which is the default, and use the
test cases once, with --section testing. The weights that are evaluated are the last: with few labels there is no case
to choose a better epoch by.

A task is a JSON file: "datalist" (made by tools.datalist with --labels and --folds), "validation_folds", "test_folds"
(the other folds are to train on), "pretraining" and "finetuning", each with "bundle", "iterations" and "overrides",
"counts" (of labelled cases) and "seeds". A "datalist" in "pretraining" names further scans, and "configs" in either the
bundle's overlays, such as ["resenc"]. Paths start at the file.
Without validation folds the learning curves are those of the training cases.

The method nnU-Net is a rival: nnU-Net v2, by tools.nnunet, with the same cases, for as much CPU time (on a GPU: time)
as the fine-tuning from scratch took. --nnunet names the Python of its environment, see tests/integration/nnunet.txt.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.bundle import ConfigParser
from scipy.stats import wilcoxon
from tqdm import tqdm

from custom.errors import BadInput
from custom.files import read_json, write_json
from custom.text import markdown_table
from tools._cli import ROOT, tool

BUNDLES = ROOT / "bundles"
# What a pre-training overrides of the paper's, which is "DAE"; None is no pre-training.
METHODS: dict[str, dict[str, Any] | None] = {
    "scratch": None,
    "token masking": {"disruptions": ["token_masking"], "contrastive_weight": 0},
    "noise": {"disruptions": ["noise"]},
    "downsampling": {"disruptions": ["downsampling"]},
    "local masking": {"disruptions": ["local_masking"]},
    "DAE": {},
    "DAE, no contrastive loss": {"contrastive_weight": 0},
    "DAE, no full-resolution skip": {"full_resolution_skip": False},
    "nnU-Net": None,
}
RIVAL = "nnU-Net"
OURS, RIVALS = "DAE", ("scratch", "token masking")  # of the paired tests
VALIDATIONS = 4  # in a fine-tuning, at the most: the points of its learning curve
# Of the checkpoints that are validated the last is kept, so that all methods train equally long and no case chooses.
LAST = {"best_checkpoint#score_function": "$lambda evaluator: evaluator.state.epoch"}
RECORD = "benchmark.json"  # in a run's folder: its command, and the seconds that it took once it has finished


class Run(NamedTuple):
    """A fine-tuning: the pre-training that it starts from, how many labelled cases it has, its seed."""

    method: str
    labelled: int
    seed: int

    def folder(self, out: Path) -> Path:
        return out / "finetuning" / slug(self.method) / f"{self.labelled} labels" / f"seed {self.seed}"


class Result(NamedTuple):
    """What a fine-tuning came to: mean foreground Dice of each case, and validation Dice by iteration."""

    run: Run
    dice: dict[str, float]
    curve: dict[int, float]
    seconds: float


def slug(method: str) -> str:
    """Return a method's name as that of a folder."""
    return method.replace(", ", " ").replace(" ", "_")


def read_task(file: Path) -> dict[str, Any]:
    """Read a task, see the head of this file.

    Returns:
        the task. The "datalist" of its "finetuning" is {"training": [...], "validation": [...], "testing": [...]}, that
        of its "pretraining" has no testing, and does not train on the cases that are held out.

    Raises:
        BadInput: for a file that lacks something, a fold that the list does not have, or more labels than cases.
    """
    task = read_json(file)
    needed = {"datalist", "validation_folds", "test_folds", "pretraining", "finetuning", "counts", "seeds"}
    if lacking := needed - task.keys():
        raise BadInput(
            f"{file} lacks {', '.join(sorted(lacking))}; `python -m tools.benchmark --help` says what it has."
        )

    def entries(name: str) -> list[dict]:
        path = (file.parent / name).resolve()
        listed = [entry for section in ("training", "validation") for entry in read_json(path).get(section, [])]
        places = ("image", "label")
        return [{key: str(path.parent / value) if key in places else value for key, value in e.items()} for e in listed]

    labelled = entries(task["datalist"])
    folds = {"validation": task["validation_folds"], "testing": task["test_folds"]}
    sections = {name: [e for e in labelled if e.get("fold") in chosen] for name, chosen in folds.items()}
    held_out = [entry for section in sections.values() for entry in section]
    training = sections["training"] = [entry for entry in labelled if entry not in held_out]
    if not task["validation_folds"]:
        sections["validation"] = training
    for name, section in sections.items():
        if not section:
            raise BadInput(
                f"{file}: the data list has no case for {name}; `python -m tools.datalist --folds` makes folds."
            )
    if max(task["counts"]) > len(training):
        raise BadInput(
            f"{file} asks for {max(task['counts'])} labelled cases, but there are {len(training)} to train on."
        )
    unlabelled = entries(task["pretraining"]["datalist"]) if "datalist" in task["pretraining"] else labelled
    held_out_files = {os.path.realpath(entry["image"]) for entry in held_out}
    task["finetuning"]["datalist"] = sections
    task["pretraining"]["datalist"] = {
        "training": [entry for entry in unlabelled if os.path.realpath(entry["image"]) not in held_out_files],
        "validation": sections["validation"],
    }
    return task


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
        **{**LAST, **sides(task), **part["overrides"], **(METHODS[method] or {})},
    )


def finetuning(task: dict, run: Run, out: Path) -> tuple[Path, list[str]]:
    """Return folder and command of a fine-tuning; those of two methods differ in `pretrained` alone."""
    part, folder, cases = task["finetuning"], run.folder(out), len(task["finetuning"]["datalist"]["training"])
    epochs = math.ceil(part["iterations"] / math.ceil(run.labelled / part["overrides"].get("batch_size", 1)))
    interval = math.ceil(epochs / VALIDATIONS)
    weights = (
        {} if METHODS[run.method] is None else {"pretrained": pretraining(task, run.method, out)[0] / "models/model.pt"}
    )
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
        **weights,
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
    parser = ConfigParser()
    parser.read_config(str(BUNDLES / part["bundle"] / "configs/train.json"))
    parser.update(part["overrides"])
    fraction = run.labelled / len(part["datalist"]["training"])
    arguments = {"modality": parser["modality"], "section": section, "fraction": fraction, "seed": run.seed}
    options = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    command = [str(python.absolute()), "-W", "ignore", str(ROOT / "tools"), "nnunet"]
    command += [str(out / "finetuning.json"), str(folder)]
    return folder, [*command, *options, "--seconds", f"{seconds:.0f}", "--labels", *parser["labels"]]


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
        return
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
    for state in folder.glob("checkpoint_*.pt"):  # nothing goes on from them, and they are most of the folder
        state.unlink()


def seconds_per_iteration(part: dict) -> float:
    """Measure a training step of the pre-training or the fine-tuning of a task."""
    parser = ConfigParser()
    names = ["train", *part.get("configs", [])]
    parser.read_config([str(BUNDLES / part["bundle"] / f"configs/{name}.json") for name in names])
    parser.update(part["overrides"])
    network = parser.get_parsed_content("network")  # on the device that the runs will take
    first = next(network.parameters())
    crops = parser["batch_size"] * (1 if "disruptions" in parser else parser["crops_per_volume"])
    image = torch.rand(crops, 1, *parser["patch_size"], device=first.device)
    for _ in range(2):  # the first is slower
        started = time.monotonic()
        output = network(image)  # of a pre-training with the features beside it
        (output[0] if isinstance(output, tuple) else output).mean().backward()
        first.grad.sum().item()  # a GPU is done when this is
    return time.monotonic() - started


def results(task: dict, runs: Sequence[Run], section: str, out: Path) -> Iterator[Result]:
    """Yield what the finished runs came to."""
    for run in runs:
        folder = run.folder(out)
        with (evaluation(task, run, section, out)[0] / "evaluation/val_mean_dice_raw.csv").open() as file:
            dice = {row["filename"]: float(row["mean"]) for row in csv.DictReader(file)}
        log = folder / "metrics.jsonl"  # nnU-Net has none
        lines = map(json.loads, log.read_text().splitlines() if log.is_file() else [])
        curve = {line["iteration"]: line["val_mean_dice"] for line in lines if "val_mean_dice" in line}
        yield Result(run, dice, curve, read_json(folder / RECORD)["seconds"])


def p_value(ours: Sequence[Result], theirs: Sequence[Result], by_case: bool) -> float:
    """Test whether two methods differ, by Wilcoxon's signed ranks of paired Dice; two-sided.

    Args:
        ours, theirs: runs of the same label count.
        by_case: pair the cases, each with its mean over the seeds; else all pairs of case and seed, of which those of
            one case are not independent.
    """

    def dice(results: Sequence[Result]) -> np.ndarray:
        table = {(result.run.seed, case): value for result in results for case, value in result.dice.items()}
        values = np.array([table[key] for key in sorted(table)]).reshape(len(results), -1)
        return values.mean(0) if by_case else values.ravel()

    difference = dice(ours) - dice(theirs)
    return float(wilcoxon(difference).pvalue) if difference.any() else 1.0


def table(found: Sequence[Result]) -> str:
    """Return a Markdown table of the mean Dice of each method and label count, and the paired tests."""
    cells = {(m, c): [r for r in found if r.run[:2] == (m, c)] for m, c, _ in (r.run for r in found)}
    methods = list(dict.fromkeys(result.run.method for result in found))
    counts = sorted({result.run.labelled for result in found})
    means: list[list] = [["pre-training", *(f"{count} labels" for count in counts)]]
    for method in methods:
        row = [method]
        for count in counts:
            dice = [np.mean(list(result.dice.values())) for result in cells.get((method, count), [])]
            row.append(f"{np.mean(dice):.4f} ± {np.std(dice):.4f} (n = {len(dice)})" if dice else "-")
        means.append(row)
    tests: list[list] = [
        ["labels", f"{OURS} against", "difference", "of each seed", "p, cases and seeds", "p, cases"],
    ]
    for count in counts:
        for rival in RIVALS:
            ours, theirs = (cells.get((method, count), []) for method in (OURS, rival))
            if ours and len(ours) == len(theirs):
                sides = [{r.run.seed: np.mean(list(r.dice.values())) for r in side} for side in (ours, theirs)]
                seeds = [sides[0][seed] - sides[1][seed] for seed in sorted(sides[0])]
                apart = ", ".join(f"{difference:+.3f}" for difference in seeds)
                p = [p_value(ours, theirs, by_case) for by_case in (False, True)]
                tests.append([count, rival, f"{np.mean(seeds):+.4f}", apart, f"{p[0]:.2g}", f"{p[1]:.2g}"])
    return f"{markdown_table(means)}\n\n{markdown_table(tests)}\n"


def draw(found: Sequence[Result], out: Path) -> None:
    """Draw the Dice over the number of labels, and over the iterations of the fine-tunings."""
    methods = list(dict.fromkeys(result.run.method for result in found))
    counts = sorted({result.run.labelled for result in found})
    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    for place, method in enumerate(methods):
        means = [[np.mean(list(r.dice.values())) for r in found if r.run[:2] == (method, count)] for count in counts]
        known = [
            (count * 1.015**place, np.mean(values), np.std(values))  # side by side, so that each bar is seen
            for count, values in zip(counts, means, strict=True)
            if values
        ]
        axis.errorbar(*np.transpose(known), marker="o", capsize=3, label=method)
    axis.set(xscale="log", xlabel="labelled cases", ylabel="mean Dice", xticks=counts, xticklabels=counts)
    axis.minorticks_off()
    figure.legend(*axis.get_legend_handles_labels(), title="pre-training", loc="outside right upper")
    figure.savefig(out / "dice_over_labels.png", dpi=120)

    figure = Figure(figsize=(4 * len(counts) + 2, 4), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, len(counts), squeeze=False, sharex=True, sharey=True)[0]
    for axis, count in zip(axes, counts, strict=True):
        for method in methods:
            curves = [result.curve for result in found if result.run[:2] == (method, count)]
            if curves and curves[0]:
                mean = np.mean([list(curve.values()) for curve in curves], axis=0)
                axis.plot(list(curves[0]), mean, marker=".", label=method)
        axis.set(title=f"{count} labelled cases", xlabel="iteration")
    axes[0].set_ylabel("mean Dice, validation")
    figure.legend(*axes[-1].get_legend_handles_labels(), title="pre-training", loc="outside right upper")
    figure.savefig(out / "learning_curves.png", dpi=120)


def write(found: Sequence[Result], section: str, out: Path) -> str:
    """Write runs.csv, table.md and the pictures; return the table."""
    with (out / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "count", "seed", "section", "cases", "dice", "seconds", "folder"])
        for result in found:
            dice = list(result.dice.values())
            folder = result.run.folder(out).relative_to(out)
            writer.writerow([*result.run, section, len(dice), f"{np.mean(dice):.6f}", f"{result.seconds:.0f}", folder])
    text = table(found)
    (out / "table.md").write_text(text)
    draw(found, out)
    return text


def benchmark(options: argparse.Namespace) -> None:
    """Run what has not finished, then write tables and pictures.

    Raises:
        BadInput: for a wrong task, or a run that fails; what has finished is kept.
    """
    task, out = read_task(options.task), options.out.resolve()
    if options.section == "validation" and not task["validation_folds"]:
        raise BadInput(f"{options.task} has no validation folds, so that it has cases for --section testing alone.")
    if RIVAL in options.methods and not (options.nnunet and "scratch" in options.methods):
        raise BadInput(f"{RIVAL} needs --nnunet PYTHON, and scratch among the --methods, whose time it gets.")
    counts, seeds = options.counts or task["counts"], options.seeds or task["seeds"]
    runs = [Run(method, count, seed) for count in counts for seed in seeds for method in options.methods]
    out.mkdir(parents=True, exist_ok=True)
    for part in ("pretraining", "finetuning"):
        file, text = out / f"{part}.json", json.dumps(task[part]["datalist"], indent=4)
        if file.is_file() and file.read_text() != text:
            raise BadInput(f"{out} holds runs of other cases, see {file}; give another OUT.")
        file.write_text(text)
    stages = {
        "pretraining": [[pretraining(task, m, out)] for m in options.methods if METHODS[m] is not None],
        "finetuning": [
            [finetuning(task, run, out), evaluation(task, run, options.section, out)]
            for run in runs
            if run.method != RIVAL
        ],
    }
    left = {part: [job for job in jobs if not all(seconds_of(*each) for each in job)] for part, jobs in stages.items()}
    if any(left.values()):
        step = {part: seconds_per_iteration(task[part]) for part in left}
        total = sum(len(jobs) * task[part]["iterations"] * step[part] for part, jobs in left.items())
        print(
            f"To be run: {len(left['pretraining'])} pre-trainings, {len(left['finetuning'])} fine-tunings; "
            f"their steps take about {total / 60:.0f} minutes, and each run half a minute more. "
            f"Ctrl-C stops, and the same command goes on."
        )
    threads = max(1, (os.cpu_count() or 1) // options.jobs)

    def work(job: list[tuple[Path, list[str]]]) -> None:
        for folder, arguments in job:
            finish(folder, arguments, threads)

    def work_all(part: str, jobs: list) -> None:
        with ThreadPoolExecutor(options.jobs) as pool:
            done = pool.map(work, jobs)
            try:
                list(tqdm(done, part, len(jobs), unit="run", disable=None))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    for part, jobs in left.items():
        work_all(part, jobs)
    rivals = [[rival(task, run, options.section, out, options.nnunet)] for run in runs if run.method == RIVAL]
    work_all(RIVAL, [jobs for jobs in rivals if seconds_of(*jobs[0]) is None])
    print(f"\n{write(list(results(task, runs, options.section, out)), options.section, out)}")
    print(f"Each run, table and pictures: {out}/runs.csv, table.md, dice_over_labels.png, learning_curves.png")


def arguments(add: Callable) -> None:
    add("task", type=Path, metavar="TASK.json", help="what to train on, see below")
    add("out", type=Path, metavar="OUT", help="folder of the runs")
    add("--section", default="validation", choices=("validation", "testing"), help="to evaluate on (%(default)s)")
    ours = [method for method in METHODS if method != RIVAL]
    add("--methods", nargs="+", default=ours, choices=METHODS, metavar="NAME",
        help=f"of {list(METHODS)} (all but the last)")  # fmt: skip
    add("--nnunet", type=Path, metavar="PYTHON", help="that has nnU-Net")
    add("--counts", type=int, nargs="+", metavar="N", help="numbers of labelled cases (the task's)")
    add("--seeds", type=int, nargs="+", metavar="N", help="(the task's)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores (%(default)s)")


main = tool("benchmark", __doc__, arguments, benchmark, "the same command goes on from here")

if __name__ == "__main__":
    sys.exit(main())
