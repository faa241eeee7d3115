"""Measure whether pre-training helps: fine-tune with few labels from several starts, and from scratch.

    python -m tools.benchmark TASK.json OUT [--section testing] [--methods scratch DAE] [--counts 4] [--seeds 0 1]
    python -m tools.benchmark DATALIST.json OUT --pretrained runs/pretraining

It only runs the bundles, each run in a folder of its own in OUT. Interrupted, the same command goes on, and what was
finished is not run again. Written to OUT: verdict.html (the answer with pictures), runs.csv (a row a run), table.md
(mean, standard deviation, paired tests), pictures. Choose recipes by the validation cases, which is the default, and
use the test cases once, with --section testing. The weights that are evaluated are the last: with few labels there is
no case to choose a better epoch by.

A task is a JSON file: "datalist" (made by tools.datalist with --labels and --folds), "validation_folds", "test_folds"
(the other folds are to train on), "pretraining" and "finetuning", each with "bundle", "iterations" and "overrides",
"counts" (of labelled cases) and "seeds". A "datalist" in "pretraining" names further scans, and "configs" in either the
bundle's overlays, such as ["resenc"]. "weights" names files of finished pre-trainings as further methods. Paths start
at the file. Without validation folds the learning curves are those of the training cases.

"iterations" of the fine-tuning may be a list: each length is a training of its own, with its own schedule, until twice
as many gain scratch less than 0.005 on validation.

A labelled data list with folds is a task too. tools.adapt writes its bundle, for --minutes; the lengths are a quarter
of what that plans, then twice as many, and so on.

The method nnU-Net is a rival: nnU-Net v2, by tools.nnunet, with the same cases, for as much CPU time (on a GPU: time)
as the fine-tuning from scratch took. --nnunet names the Python of its environment, see tests/integration/nnunet.txt.
"""

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from custom.errors import BadInput
from tools._cli import say, tool
from tools.benchmark.runs import (
    Run,
    evaluation,
    finetuning,
    finish,
    pretraining,
    results,
    rival,
    seconds_of,
    seconds_per_iteration,
)
from tools.benchmark.task import GIVEN, METHODS, PRETRAININGS, RIVAL, SCRATCH, read, write_lists
from tools.benchmark.verdict import Found, write

Job = list[tuple[Path, list[str]]]  # commands that follow each other, and their folders


def benchmark(options: argparse.Namespace) -> None:
    """Run what has not finished, then write tables, pictures and the page.

    Raises:
        BadInput: for a wrong task, or a run that fails; what has finished is kept.
    """
    task, out = read(options), options.out.resolve()
    given = list(task["weights"])
    ours = [SCRATCH, *(PRETRAININGS if "pretraining" in task else []), *given]
    methods, section = options.methods or ours, options.section or ("testing" if GIVEN in given else "validation")
    if unknown := set(methods) - {*ours, RIVAL}:
        raise BadInput(f"{options.task} has no method {', '.join(sorted(unknown))}; it has {', '.join(ours)}.")
    if section == "validation" and not task["validation_folds"]:
        raise BadInput(f"{options.task} has no validation folds, so that it has cases for --section testing alone.")
    if RIVAL in methods and not (options.nnunet and SCRATCH in methods):
        raise BadInput(f"{RIVAL} needs --nnunet PYTHON, and scratch among the --methods, whose time it gets.")
    counts, seeds = options.counts or task["counts"], options.seeds or task["seeds"]
    lengths = task["finetuning"]["iterations"]
    if len(lengths) > 1 and not (SCRATCH in methods and task["validation_folds"]):
        raise BadInput("Several lengths need scratch among the --methods, and validation folds, which tell its end.")
    write_lists(task, out)
    threads = max(1, (os.cpu_count() or 1) // options.jobs)

    def jobs(length: int, counts: list[int]) -> list[Job]:
        runs = [Run(m, count, length, seed) for count in counts for seed in seeds for m in methods if m != RIVAL]
        return [[finetuning(task, run, out), evaluation(task, run, section, out)] for run in runs]

    def work(job: Job) -> None:
        for folder, arguments in job:
            finish(folder, arguments, threads)

    def work_all(part: str, jobs: list[Job]) -> None:
        left = unfinished(jobs)
        with ThreadPoolExecutor(options.jobs) as pool:
            done = pool.map(work, left)
            try:
                list(tqdm(done, part, len(left), unit="run", disable=None if left else True))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    starts = [[pretraining(task, method, out)] for method in methods if method in PRETRAININGS and method not in given]
    announce(task, unfinished(starts), {length: unfinished(jobs(length, counts)) for length in lengths})
    work_all("pretraining", starts)
    runs: list[Run] = []
    for length in lengths:
        work_all(f"{length} iterations", jobs(length, counts))
        here = [Run(method, count, length, seed) for count in counts for seed in seeds for method in methods]
        rivals = [[rival(task, run, section, out, options.nnunet)] for run in here if run.method == RIVAL]
        work_all(RIVAL, rivals)
        runs += here
        found = Found(list(results(task, runs, section, out)))
        answer = write(found.results, section, out)
        if len(lengths) > 1:
            counts = [count for count in counts if not found.flat(count)]
        if not counts:
            break
    say(f"\n{answer}\nThe answer: {out}/verdict.html; each run: runs.csv")


def unfinished(jobs: list[Job]) -> list[Job]:
    return [job for job in jobs if not all(seconds_of(*each) is not None for each in job)]


def announce(task: dict, starts: list[Job], jobs: dict[int, list[Job]]) -> None:
    """Say what is to be run, and how long that takes at the most."""
    if not (starts or any(jobs.values())):
        return
    total = sum(length * len(left) for length, left in jobs.items()) * seconds_per_iteration(task["finetuning"])
    if starts:
        part = task["pretraining"]
        total += len(starts) * part["iterations"] * seconds_per_iteration(part)
    most = " at the most" if len(jobs) > 1 else ""
    say(
        f"To be run: {len(starts)} pre-trainings, {sum(map(len, jobs.values()))} fine-tunings{most}; their steps take "
        f"about {total / 60:.0f} minutes, and each run half a minute more. Ctrl-C stops, and the same command goes on."
    )


def arguments(add: Callable) -> None:
    add("task", type=Path, metavar="TASK.json", help="what to train on, or a labelled data list; see below")
    add("out", type=Path, metavar="OUT", help="folder of the runs")
    add("--section", choices=("validation", "testing"), help="to evaluate on (validation; of a data list testing)")
    add("--methods", nargs="+", metavar="NAME",
        help=f"of {METHODS} and the task's weights (all that the task has but nnU-Net)")  # fmt: skip
    add("--pretrained", metavar="FILE", help="weights to be judged, or the folder of their run; with a data list")
    add("--minutes", type=float, default=10, help="that a training is planned for; with a data list (%(default)s)")
    add("--nnunet", type=Path, metavar="PYTHON", help="that has nnU-Net")
    add("--counts", type=int, nargs="+", metavar="N", help="numbers of labelled cases (the task's)")
    add("--seeds", type=int, nargs="+", metavar="N", help="(the task's, or 0 1 2)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time, which share the cores (%(default)s)")


main = tool("benchmark", __doc__, arguments, benchmark, "the same command goes on from here")

if __name__ == "__main__":
    sys.exit(main())
