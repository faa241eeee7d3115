"""What a benchmark trains: the cases, the starts, the lengths."""

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from custom.engine.checkpoint import weights_file
from custom.errors import BadInput
from custom.files import read_json, write_json
from tools._cli import ROOT
from tools.adapt.__main__ import main as adapt

BUNDLES = ROOT / "bundles"
SCRATCH, RIVAL, GIVEN = "scratch", "nnU-Net", "pre-trained"
# What a pre-training overrides of the paper's, which is "DAE".
PRETRAININGS: dict[str, dict[str, Any]] = {
    "token masking": {"disruptions": ["token_masking"], "contrastive_weight": 0},
    "noise": {"disruptions": ["noise"]},
    "downsampling": {"disruptions": ["downsampling"]},
    "local masking": {"disruptions": ["local_masking"]},
    "DAE": {},
    "DAE, no contrastive loss": {"contrastive_weight": 0},
    "DAE, no full-resolution skip": {"full_resolution_skip": False},
}
METHODS = [SCRATCH, *PRETRAININGS, RIVAL]
LENGTHS = (1, 2, 4, 8, 16)  # of a fine-tuning of one's own data, in quarters of what the bundle is planned for
FEWEST = 4  # labelled cases of one's own data; then twice as many, up to all


def read(options: Namespace) -> dict[str, Any]:
    """Read a task, or make one of a labelled data list, see the head of `tools.benchmark`.

    Returns:
        the task. The "datalist" of its "finetuning" is {"training": [...], "validation": [...], "testing": [...]}; that
        of its "pretraining", if it has one, has no testing, and does not train on the cases that are held out. The
        "iterations" of its "finetuning" are a list that rises.

    Raises:
        BadInput: for a file that lacks something, a fold that the list does not have, or more labels than cases.
    """
    content = read_json(options.task)
    return own_task(options) if "training" in content else read_task(options.task)


def read_task(file: Path) -> dict[str, Any]:
    """Read the file of a task; returns and raises as `read`."""
    task = read_json(file)
    needed = {"datalist", "validation_folds", "test_folds", "finetuning", "counts", "seeds"}
    needed |= set() if "weights" in task else {"pretraining"}
    if lacking := needed - task.keys():
        raise BadInput(
            f"{file} lacks {', '.join(sorted(lacking))}; `python -m tools.benchmark --help` says what it has."
        )
    labelled = entries((file.parent / task["datalist"]).resolve())
    sections = task["finetuning"]["datalist"] = split(file, labelled, task["validation_folds"], task["test_folds"])
    check_counts(file, task["counts"], sections)
    lengths = task["finetuning"]["iterations"]
    task["finetuning"]["iterations"] = sorted(lengths) if isinstance(lengths, list) else [lengths]
    task["weights"] = {name: str(file.parent.resolve() / path) for name, path in task.get("weights", {}).items()}
    if "pretraining" not in task:
        return task
    part = task["pretraining"]
    unlabelled = entries((file.parent / part["datalist"]).resolve()) if "datalist" in part else labelled
    apart = ["testing", *(["validation"] if task["validation_folds"] else [])]
    held_out = {os.path.realpath(entry["image"]) for name in apart for entry in sections[name]}
    part["datalist"] = {
        "training": [entry for entry in unlabelled if os.path.realpath(entry["image"]) not in held_out],
        "validation": sections["validation"],
    }
    return task


def own_task(options: Namespace) -> dict[str, Any]:
    """Make the task of a data list and a start, with a bundle that `tools.adapt` writes; returns and raises as `read`.

    The first fold validates, the next third of the folds tests.
    """
    file, out = options.task, options.out.resolve()
    if options.pretrained is None:
        raise BadInput(f"{file} is a data list; give the weights to be judged, --pretrained FILE.")
    labelled = entries(file.resolve())
    folds = sorted({entry["fold"] for entry in labelled if "fold" in entry})
    if len(folds) < 3:
        raise BadInput(f"{file} has {len(folds)} folds; `python -m tools.datalist --folds 5` makes enough.")
    tested = folds[1 : 1 + max(1, len(folds) // 3)]
    sections = split(file, labelled, folds[:1], tested)
    cases = len(sections["training"])
    counts = [FEWEST * 2**n for n in range(10) if FEWEST * 2**n < cases] + [cases]
    counts = options.counts or counts
    check_counts(file, counts, sections)
    weights, bundle = str(Path(weights_file(options.pretrained)).resolve()), out / "bundle"
    listed, done = out / "adapt.json", out / "adapted.json"
    command = [str(listed), str(bundle), "--minutes", str(options.minutes), "--pretrained", weights]
    if done.is_file() and read_json(done, list) != command:
        raise BadInput(f"{out} has a bundle for other weights or minutes, see {done}; give another OUT.")
    if not done.is_file():
        shutil.rmtree(bundle, ignore_errors=True)  # of a start that was interrupted
        names = {name: value for name, value in read_json(file).items() if name in ("labels", "modality")}
        write_json(listed, names | {name: sections[name] for name in ("training", "validation")})
        if adapt(command):
            raise BadInput(f"No bundle could be adapted to {file}, see above.")
        write_json(done, command)
    config = read_json(bundle / "configs/train.json")
    whole = -(-cases // config["batch_size"]) * config["max_epochs"]
    return {
        "validation_folds": folds[:1],
        "finetuning": {
            "bundle": str(bundle),
            "iterations": sorted({max(1, whole * length // 4) for length in LENGTHS}),
            "overrides": {},
            "datalist": sections,
        },
        "weights": {GIVEN: weights},
        "counts": counts,
        "seeds": [0, 1, 2],
    }


def entries(path: Path) -> list[dict]:
    """Return the cases of a data list, with whole paths."""
    places = ("image", "label")
    listed = [entry for section in ("training", "validation") for entry in read_json(path).get(section, [])]
    return [{key: str(path.parent / value) if key in places else value for key, value in e.items()} for e in listed]


def split(file: Path, labelled: list[dict], validation: Sequence[int], testing: Sequence[int]) -> dict[str, list]:
    """Return the cases of each section, by their folds; without validation folds the training cases validate too.

    Raises:
        BadInput: for a section without cases.
    """
    folds = {"validation": validation, "testing": testing}
    sections = {name: [e for e in labelled if e.get("fold") in chosen] for name, chosen in folds.items()}
    held_out = [entry for section in sections.values() for entry in section]
    sections["training"] = [entry for entry in labelled if entry not in held_out]
    if not validation:
        sections["validation"] = sections["training"]
    for name, section in sections.items():
        if not section:
            raise BadInput(
                f"{file}: the data list has no case for {name}; `python -m tools.datalist --folds` makes folds."
            )
    return sections


def check_counts(file: Path, counts: Sequence[int], sections: dict[str, list]) -> None:
    """Raise BadInput for more labelled cases than there are to train on."""
    if max(counts) > (cases := len(sections["training"])):
        raise BadInput(f"{file} asks for {max(counts)} labelled cases, but there are {cases} to train on.")


def config_of(part: dict[str, Any]) -> ConfigParser:
    """Return the training config of the pre-training or the fine-tuning of a task."""
    parser = ConfigParser()
    names = ["train", *part.get("configs", [])]
    parser.read_config([str(BUNDLES / part["bundle"] / f"configs/{name}.json") for name in names])
    parser.update(part["overrides"])
    return parser


def write_lists(task: dict[str, Any], out: Path) -> None:
    """Write the data lists of the trainings.

    Raises:
        BadInput: where the folder has other ones.
    """
    out.mkdir(parents=True, exist_ok=True)
    for part in ("pretraining", "finetuning"):
        if part in task:
            file, text = out / f"{part}.json", json.dumps(task[part]["datalist"], indent=4)
            if file.is_file() and file.read_text() != text:
                raise BadInput(f"{out} holds runs of other cases, see {file}; give another OUT.")
            file.write_text(text)
