"""Glue between the configs and MONAI's Ignite engines: batches, checkpoints, logs."""

import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointLoader
from monai.transforms import Compose, RandFlip
from monai.utils import convert_to_tensor
from torch.nn.utils import get_total_norm

from custom.disruption import Disrupt
from custom.errors import BadInput

logger = logging.getLogger(__name__)


def prepare_batch(batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs) -> tuple:
    """Prepare a batch for `DisruptiveAutoencoder` and `DisruptiveLoss`.

    Args:
        batch: "image" (disrupted) and "label" (original), both (B, 1, D, H, W), and "modality", B names.

    Returns:
        image, {"image": original, "modality": (B,) integers}, (), {"return_embedding": True}.
    """
    image = batch["image"].to(device, non_blocking=non_blocking, **kwargs)
    original = batch["label"].to(device, non_blocking=non_blocking, **kwargs)
    # Any name has a number, the same on every rank and without a list of all names.
    modality = torch.tensor([zlib.crc32(name.encode()) for name in batch["modality"]], device=device)
    return image, {"image": original, "modality": modality}, (), {"return_embedding": True}


class DisruptBatch:
    """Flip and disrupt the images of a batch where they are trained on, and prepare it as `prepare_batch` does.

    The batch is given both: "label", its images as they were but for the flips, and "image", disrupted.

    Args:
        flip_probability: of a flip along each axis, of every image by itself.
        kwargs: see `Disrupt`.

    Randomness:
        NumPy's global state, which `custom.resume.RunState` sets before every iteration.
    """

    def __init__(self, flip_probability: float = 0, **kwargs) -> None:
        self.flip = Compose([RandFlip(flip_probability, axis) for axis in range(3)])
        self.disrupt = Disrupt(**kwargs)

    def __call__(self, batch: dict[str, Any], device: torch.device, non_blocking: bool = False, **kwargs) -> tuple:
        for transform in (self.flip, self.disrupt):
            transform.set_random_state(seed=np.random.randint(2**31))
        images = batch["image"].to(device, non_blocking=non_blocking, **kwargs)
        batch["label"] = torch.stack([convert_to_tensor(self.flip(image)) for image in images])
        batch["image"] = torch.stack([self.disrupt(image) for image in batch["label"]])
        return prepare_batch(batch, device)


class On:
    """Attach any function of an engine to an event, so that a config can use it as a handler.

    Args:
        event: name of an `ignite.engine.Events`, such as "EPOCH_COMPLETED".
        handler: called with the engine.
    """

    def __init__(self, event: str, handler: Callable[[Engine], Any]) -> None:
        self.event = Events[event]
        self.handler = handler

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(self.event, self.handler)


class Progress(ProgressBar):
    """Ignite's progress bar, with the loss when there is one."""

    def attach(self, engine: Engine) -> None:
        def loss(output: Any) -> dict[str, float]:
            return {"loss": output["loss"].item()} if isinstance(output, Mapping) and "loss" in output else {}

        super().attach(engine, output_transform=loss)


class LoadCheckpoint(CheckpointLoader):
    """MONAI's `CheckpointLoader`, which says in a sentence what is wrong with a checkpoint.

    Args: see `CheckpointLoader`.

    Raises:
        BadInput: for a checkpoint that is missing, damaged or of another network.
    """

    def __call__(self, engine: Engine) -> None:
        if not os.path.isfile(self.load_path):
            raise BadInput(f"There is no checkpoint {self.load_path}; train first, or name another with --ckpt_dir.")
        try:
            super().__call__(engine)
        except Exception as error:
            raise BadInput(
                f"The checkpoint {self.load_path} can't be loaded, it is damaged or of another network or run: "
                f"{str(error)[:300]} Give the settings that it was trained with, or other folders."
            ) from error


class StopOnNaN:
    """Stop when the loss or the weights are NaN or infinite, name the cases of the batch and keep it.

    The loss is looked at before it reaches the weights, and the weights after each step: a loss that is finite can have
    gradients that are not.

    Attach it before whatever saves the weights.

    Args:
        dump_dir: folder that the batch is written to, as `nan_batch_rank=N.pt`.

    Raises:
        BadInput: from the training loop.
    """

    def __init__(self, dump_dir: str) -> None:
        self.dump_dir = Path(dump_dir)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.check_loss)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.check_weights)

    def check_loss(self, engine: Engine) -> None:
        self.check(engine, "loss", engine.state.output["loss"])

    def check_weights(self, engine: Engine) -> None:
        self.check(engine, "norm of the weights", get_total_norm(engine.network.parameters()))

    def check(self, engine: Engine, name: str, value: torch.Tensor) -> None:
        if not torch.isfinite(value):
            batch = engine.state.batch
            cases = ", ".join(dict.fromkeys(batch["case"]))
            dump = self.dump_dir / f"nan_batch_rank={idist.get_rank()}.pt"
            dump.parent.mkdir(parents=True, exist_ok=True)
            # Plain tensors: what MONAI adds to them is not loaded with `weights_only`.
            tensors = {name: batch[name].as_subclass(torch.Tensor) for name in ("image", "label")}
            torch.save({"case": batch["case"], **tensors}, dump)
            raise BadInput(
                f"The {name} is {value.item()} in iteration {engine.state.iteration}, with the cases {cases}; look at "
                f"these files and at the batch in {dump}, or lower --learning_rate. The last checkpoint is untouched."
            )


class MetricsLog:
    """Write a JSON line of the run's metrics to a file at each epoch, and say them in the log.

    A resumed run replaces the lines of the epochs that it trains again.

    Args:
        path: the file, .jsonl.
        evaluator: its metrics go into the line too, of the epochs in which it has run.
        state: further figures, called at each epoch, such as the learning rate.
    """

    def __init__(self, path: str, evaluator: Engine, state: Callable[[], dict[str, float]] = dict) -> None:
        self.path = Path(path)
        self.evaluator = evaluator
        self.state = state

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        state = engine.state
        metrics = dict(state.metrics)
        if self.evaluator.state.epoch == state.epoch:
            metrics |= self.evaluator.state.metrics
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        lines = [line for line in lines if json.loads(line)["epoch"] < state.epoch]
        lines.append(json.dumps({"epoch": state.epoch, "iteration": state.iteration, **self.state(), **metrics}))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text("\n".join(lines) + "\n")
        os.replace(beside, self.path)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        logger.info(f"Epoch {state.epoch} of {state.max_epochs}: {figures}")
