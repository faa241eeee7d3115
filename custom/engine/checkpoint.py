"""Every way in which weights and states of runs are written and read."""

import logging
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from monai.engines import Evaluator
from monai.handlers import CheckpointLoader
from torch import nn

from custom.engine.config_check import running_workflow
from custom.engine.run_record import RECORD, check_trained_alike, portable
from custom.errors import BadInput
from custom.files import read_json, replacing

logger = logging.getLogger(__name__)


class AtomicSaver:
    """Save for Ignite's `Checkpoint`, on the first rank: beside, and when that is on the disk, into place.

    Not Ignite's `DiskSaver`, which `Checkpoint` tells to remove a file before the next one is saved, and which leaves
    files behind when it is killed.

    Args:
        dirname: folder, made if missing.
        run_dir: folder of the run whose `run.json` weights carry with them, None for what is no network's weights.

    Raises:
        BadInput: for a folder that can't be made, and a disk that is full or can't be written; what was saved before is
            untouched.
    """

    def __init__(self, dirname: str | Path, run_dir: str | Path | None = None) -> None:
        self.dirname = Path(dirname)
        self.run_dir = run_dir
        try:
            self.dirname.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(
                f"The folder {dirname} can't be made ({error.strerror}); name another to write to."
            ) from error

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        if idist.get_rank() > 0:
            return
        if self.run_dir is not None and Path(self.run_dir, RECORD).is_file():
            # As `_metadata` of a state dict: whoever loads the weights does not meet it.
            checkpoint.training = portable(read_json(Path(self.run_dir, RECORD), list)[-1])  # type: ignore[attr-defined]
        try:
            with replacing(self.dirname / filename) as part, open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            cause = error.__context__ or error  # torch's writer raises another error on top of the disk's
            raise BadInput(
                f"{self.dirname / filename} could not be saved ({cause}); repair the disk or make room on it, then the "
                f"same command goes on from the last checkpoint, which is intact."
            ) from error


class WeightsSaver:
    """Let Ignite's `Checkpoint` save after each validation, and at the end of a training in which none has saved.

    It is a handler of the evaluator and of the trainer.

    Args:
        checkpoint: saves the best weights, by a score of the evaluator.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self.save_best if isinstance(engine, Evaluator) else self.save_last)

    def save_best(self, engine: Engine) -> None:
        """Save the weights if they are the best so far; a score that is no number tells nothing of them."""
        if math.isfinite(self.checkpoint.score_function(engine)):
            self.checkpoint(engine)
        else:
            logger.warning("This validation has measured nothing, as without a labelled voxel; it chooses no weights.")

    def save_last(self, engine: Engine) -> None:
        """Save the weights as they are, unless a validation has saved some."""
        best = self.checkpoint
        if best.last_checkpoint is None:
            Checkpoint(best.to_save, best.save_handler, filename_pattern=best.filename_pattern, n_saved=1)(engine)


class CheckedCheckpointLoader(CheckpointLoader):
    """MONAI's `CheckpointLoader`, which says in a sentence what is wrong with a checkpoint.

    Weights are refused where the config that is run contradicts their training.

    Args: see `CheckpointLoader`; the path may be the folder of a run.

    Raises:
        BadInput: for a checkpoint that is missing, damaged, of another network or of another training.
    """

    load_path: str

    def __call__(self, engine: Engine) -> None:
        self.load_path = weights_file(self.load_path)
        if not os.path.isfile(self.load_path):
            raise BadInput(f"There is no checkpoint {self.load_path}; train first, or name another with --ckpt_dir.")
        if set(self.load_dict) == {"model"}:
            check_trained_alike(self.load_path, training_of(self.load_path), running_workflow())
        try:
            super().__call__(engine)
        except Exception as error:
            raise BadInput(
                f"The checkpoint {self.load_path} can't be loaded, it is damaged or of another network or run: "
                f"{str(error)[:300]} Give the settings that it was trained with, or other folders."
            ) from error


def is_whole(checkpoint: Path) -> bool:
    """Whether all of a checkpoint can be read, and is what was written: torch saves a zip, which has checksums."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile raises whatever the damage leads to
        return False


def weights_file(place: str | Path) -> str:
    """Return the file of weights that a user names: by itself, or by the folder of a run."""
    inside = (Path(place, name) for name in ("models/model.pt", "model.pt"))
    return str(next((file for file in inside if file.is_file()), place))


def read_checkpoint(checkpoint: str | Path) -> Any:
    """Return the content of a checkpoint; nothing but tensors and plain values is unpickled.

    Raises:
        BadInput: for a file that is missing or damaged.
    """
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadInput(f"There is no checkpoint {checkpoint}; train first, or name another.") from error
    except Exception as error:  # torch raises whatever the damage leads to
        raise BadInput(
            f"The checkpoint {checkpoint} can't be loaded, it is damaged or no PyTorch checkpoint: {str(error)[:200]}"
        ) from error


def training_of(checkpoint: str | Path) -> dict[str, Any] | None:
    """Return what the training of weights was started with: the record that they carry, or None."""
    return getattr(read_checkpoint(checkpoint), "training", None)


def read_weights(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    """Read the weights of a network: a state dict, alone or under "model" (a run's state) or "state_dict".

    Args:
        checkpoint: a file, or the folder of a run.

    Raises:
        BadInput: for a file that is missing, damaged or holds no weights.
    """
    checkpoint = weights_file(checkpoint)
    content = read_checkpoint(checkpoint)
    weights = content.get("model", content.get("state_dict", content)) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise BadInput(f"The checkpoint {checkpoint} holds no network's weights; name a model.pt of a training.")
    return {name.removeprefix("module."): value for name, value in weights.items()}


def load_weights(network: nn.Module, checkpoint: str | Path) -> nn.Module:
    """Load all weights of a checkpoint into a network and return it.

    Raises:
        BadInput: as `read_weights`, for weights of another network, and where the config that is run contradicts the
            training.
    """
    weights = read_weights(checkpoint)
    check_trained_alike(checkpoint, training_of(weights_file(checkpoint)), running_workflow())
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise BadInput(
            f"The checkpoint {checkpoint} can't be loaded, it is of another network: {str(error)[:300]} Give the "
            f"settings that it was trained with."
        ) from error
    return network
