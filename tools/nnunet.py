"""Train nnU-Net v2 for as long as a bundle took, and measure its Dice as the bundles do: a rival of tools.benchmark.

    NNUNET_PYTHON -m tools.nnunet LIST.json OUT --labels NAME ... --section testing --seconds 600

It plans, prepares, trains and predicts as nnU-Net does by itself: configuration 3d_fullres, its own augmentation, loss
and optimiser, mirrored copies in prediction. What differs is the length: planning, preparing and training take the
given time, CPU time of all processes or on a GPU the clock's, and the learning rate falls to 0 by the same curve within
it. It trains on all cases that it is given. Its environment is tests/integration/nnunet.txt.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine
from monai.handlers import from_engine
from monai.metrics import DiceMetric
from monai.transforms import Compose

from custom.data import LoadLabeld, LoadScand, read_datalist
from custom.errors import BadInput
from custom.evaluation.metrics import Means, SegmentationReport
from custom.files import read_json, write_json
from tools._cli import tool

STARTED = time.monotonic()
NAME = "Dataset001_cases"


def spent() -> float:
    """Return the seconds so far: of the CPU, of this process and those that it waited for, or on a GPU the clock's."""
    if torch.cuda.is_available():
        return time.monotonic() - STARTED
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def prepare(cases: list[dict], labels: list[str], modality: str, folder: Path) -> dict[str, Any]:
    """Plan and prepare the cases, each once, in one process; return nnU-Net's dataset.json.

    Raises:
        BadInput: where nnU-Net is not installed.
    """
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    os.environ |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"}  # the planner takes as many threads
    try:
        from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    except ImportError as error:
        raise BadInput(
            f"{sys.executable} has no nnU-Net ({error}); see the head of tests/integration/nnunet.txt."
        ) from error
    dataset = {
        "channel_names": {"0": "CT" if modality == "ct" else modality},
        "labels": {name: id for id, name in enumerate(labels)},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "dataset": {f"case_{n:04}": {"images": [c["image"]], "label": c["label"]} for n, c in enumerate(cases)},
    }
    (folder / "raw" / NAME).mkdir(parents=True, exist_ok=True)
    write_json(folder / "raw" / NAME / "dataset.json", dataset)
    api.extract_fingerprints([1], num_processes=1)
    api.plan_experiments([1])
    api.preprocess([1], configurations=["3d_fullres"], num_processes=[1])
    os.environ |= {"nnUNet_n_proc_DA": "0"}  # crops are made in this process
    return dataset


def train(dataset: dict[str, Any], seconds: float, folder: Path) -> Any:
    """Train until so many seconds are spent, and return nnU-Net's trainer.

    Raises:
        BadInput: where they are spent before the first iteration.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plans = read_json(folder / "preprocessed" / NAME / "nnUNetPlans.json") | {"continue_training": False}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = nnUNetTrainer(plans, "3d_fullres", "all", dataset, device)
    trainer.on_train_start()
    trainer.network.train()
    started, iterations = spent(), 0
    if started >= seconds:
        raise BadInput(f"nnU-Net took {started:.0f} s to plan and prepare, and --seconds is {seconds:g}; give more.")
    while (left := (seconds - spent()) / (seconds - started)) > 0:
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.initial_lr * left**0.9
        loss = trainer.train_step(next(trainer.dataloader_train))["loss"]
        iterations += 1
        if iterations % 10 == 0:
            print(f"{spent():.0f} s: iteration {iterations}, loss {loss:.3f}", flush=True)
    trainer.on_train_end()
    print(f"{iterations} iterations in {spent():.0f} s, of which {started:.0f} s before the first", flush=True)
    return trainer


def predict(trainer: Any, cases: list[dict], folder: Path) -> None:
    """Write a label map for each case, as nnU-Net does."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    predictor = nnUNetPredictor(device=trainer.device, perform_everything_on_device=trainer.device.type == "cuda")
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        trainer.dataset_json,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [str(folder / str(number)) for number in range(len(cases))]
    predictor.predict_from_files_sequential([[case["image"]] for case in cases], outputs)


def measure(cases: list[dict], labels: list[str], predicted: Path, out: Path) -> None:
    """Write the Dice of each case, by what evaluates a bundle."""
    load = Compose([LoadScand("image"), LoadLabeld(["label", "pred"], labels)])
    engine = Engine(lambda _, batch: [load(case) for case in batch])
    dice = DiceMetric(include_background=False, num_classes=len(labels))
    engine.state.metric_details = {}
    Means(dice, output_transform=from_engine(["pred", "label"])).attach(engine, "val_mean_dice")
    SegmentationReport(str(out), labels).attach(engine)
    engine.run([[case | {"pred": str(predicted / f"{n}.nii.gz")}] for n, case in enumerate(cases)])


def nnunet(options: argparse.Namespace) -> None:
    """Train, predict, measure."""
    random.seed(options.seed)
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = os.path.dirname(os.path.abspath(options.datalist))
    more = {"dataset_dir": folder, "labelled": True, "apart": False}
    cases = read_datalist(options.datalist, "training", fraction=options.fraction, seed=options.seed, **more)
    tested = read_datalist(options.datalist, options.section, **more)
    if not isinstance(cases[0]["image"], str):
        raise BadInput(f"{options.datalist} has cases of several files, which this tool does not pass on.")
    out = options.out.resolve()
    dataset = prepare(cases, options.labels, options.modality, out / "nnunet")
    trainer = train(dataset, options.seconds, out / "nnunet")
    predict(trainer, tested, out / "predicted")
    measure(tested, options.labels, out / "predicted", out / options.section / "evaluation")


def arguments(add: Callable) -> None:
    add("datalist", metavar="LIST.json", help="data list with the section training and the one to test")
    add("out", type=Path, metavar="OUT", help="folder to write")
    add("--labels", nargs="+", required=True, metavar="NAME", help="of the classes by their ids, background first")
    add("--modality", default="mri", help="ct, or any other (%(default)s)")
    add("--section", default="validation", help="to test (%(default)s)")
    add("--fraction", type=float, default=1, help="of the cases to train on (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    add("--seconds", type=float, required=True, help="that planning, preparing and training may take")


main = tool("nnunet", __doc__, arguments, nnunet)

if __name__ == "__main__":
    sys.exit(main())
