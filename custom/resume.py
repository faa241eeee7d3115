"""A run that is killed at any moment and started again ends as if it had never been interrupted."""

import contextlib
import logging
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from ignite.metrics import Metric
from ignite.utils import manual_seed

from custom.dataset import EpochSampler, mix
from custom.errors import BadInput
from custom.handlers import LoadCheckpoint

logger = logging.getLogger(__name__)


class Saver(DiskSaver):
    """Ignite's `DiskSaver`, which writes beside and moves into place, and says in a sentence when it can't.

    Args:
        dirname: folder, made if missing.

    Raises:
        BadInput: for a disk that is full or can't be written; what was saved before is untouched.
    """

    def __init__(self, dirname: str) -> None:
        super().__init__(dirname, atomic=True, require_empty=False)

    def __call__(self, checkpoint: Mapping, filename: str, metadata: Mapping | None = None) -> None:
        try:
            super().__call__(checkpoint, filename, metadata)
        except (OSError, RuntimeError) as error:  # torch's writer turns the former into the latter
            free_mb = shutil.disk_usage(self.dirname).free / 2**20
            raise BadInput(
                f"{self.dirname / filename} could not be saved, with {free_mb:.0f} MB free on its disk ({error}); make "
                f"room, then the same command goes on from the last checkpoint, which is intact."
            ) from error

    def remove(self, filename: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # a kill came between removing a file and saying so in the next
            super().remove(filename)


class RunState:
    """Save the state of a training run after every epoch, and go on from it when the run is started again.

    Everything random in an iteration depends on the seed and the iteration's number alone, so that no random state has
    to be saved. Files are written beside and moved into place, so that a kill leaves a whole one; the last two are
    kept. SIGTERM and Ctrl-C save after the current iteration, or the last one whose gradients it
    accumulates, and end the process; a second one ends it at once.

    Attach it after all handlers whose work should be in the state, such as validation.

    Args:
        run_dir: folder of the run; a run is resumed if it holds a `checkpoint_iteration=N.pt`.
        objects: what has a state beside the trainer: model, optimizer, ...
        metrics: of the training, which an interrupted epoch goes on with.
        seed: of what is random in the main process; what is random in a sample is seeded by `CaseDataset`.
        resume: False starts anew, whatever the folder holds.
        map_location: device to load to.

    Raises:
        BadInput: when no checkpoint can be read, or it is of another network.
        SystemExit: with a sentence, when the process was told to stop.
    """

    def __init__(
        self,
        run_dir: str,
        objects: dict[str, Any],
        metrics: Mapping[str, Metric] | None = None,
        seed: int = 0,
        resume: bool = True,
        map_location: Any = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.objects = objects
        self.metrics = dict(metrics or {})
        self.loaded_metrics: Mapping[str, Any] = {}
        self.seed = seed
        self.resume = resume
        self.map_location = map_location
        self.told_to_stop = False

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_STARTED, self.skip_what_was_done)
        engine.add_event_handler(Events.ITERATION_STARTED, self.reseed)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.stop_if_told)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def start(self, engine: Engine) -> None:
        """Load the last checkpoint, if there is one, and listen to signals."""
        # The trainer's handlers, and so this one, are made before it is.
        scaler = getattr(engine, "scaler", None)
        self.checkpoint = Checkpoint(
            {**self.objects, "trainer": engine, "metrics": self} | ({"scaler": scaler} if scaler else {}),
            Saver(self.run_dir),
            filename_pattern="checkpoint_iteration={global_step}.pt",
            global_step_transform=lambda engine, _: engine.state.iteration,
            include_self=True,
            n_saved=2,
        )
        if self.resume:
            self.load(engine)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.tell_to_stop)

    def load(self, engine: Engine) -> None:
        files = sorted(self.run_dir.glob("checkpoint_iteration=*.pt"), key=lambda file: int(file.stem.split("=")[1]))
        if not files:
            return
        while not is_whole(files[-1]):
            damaged = files.pop()
            if not files:
                raise BadInput(
                    f"{damaged} is damaged and there is no other checkpoint; train anew in another --output_dir, or "
                    f"here with --resume False."
                )
            logger.warning(f"{damaged} is damaged; {files[-1].name}, the one before it, is used.")
        load_dict = {**self.checkpoint.to_save, "checkpointer": self.checkpoint}
        LoadCheckpoint(str(files[-1]), load_dict, map_location=self.map_location)(engine)
        state = engine.state
        logger.info(f"Resuming from {files[-1]}: {state.epoch} of {state.max_epochs} epochs are done.")
        if state.epoch >= state.max_epochs:
            logger.info("Nothing is left to train: raise --max_epochs, or start anew in another --output_dir.")

    def skip_what_was_done(self, engine: Engine) -> None:
        """Let an interrupted epoch go on where it was, its metrics too, which have just been reset."""
        loader, done = engine.state.dataloader, engine.state.iteration % engine.state.epoch_length
        if isinstance(getattr(loader, "sampler", None), EpochSampler):
            loader.sampler.start = done * loader.batch_size
        if done:
            for name, metric in self.metrics.items():
                metric.load_state_dict(self.loaded_metrics[name])

    def reseed(self, engine: Engine) -> None:
        manual_seed(mix(self.seed, idist.get_rank(), engine.state.iteration))

    def tell_to_stop(self, number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        logger.warning(f"{signal.Signals(number).name}: stopping after this iteration.")
        self.told_to_stop = True

    def stop_if_told(self, engine: Engine) -> None:
        if idist.get_world_size() > 1:  # all ranks stop after the same iteration
            self.told_to_stop = idist.all_reduce(int(self.told_to_stop), "MAX") > 0
        # After the last iteration of an epoch its validation is due first, and gradients that accumulate are not saved.
        done = engine.state.iteration % engine.state.epoch_length
        if self.told_to_stop and done and done % getattr(engine, "accumulation_steps", 1) == 0:
            self.save(engine)

    def save(self, engine: Engine) -> None:
        stop = self.told_to_stop
        self.checkpoint(engine)
        if stop:
            saved = self.run_dir / self.checkpoint.last_checkpoint
            raise SystemExit(f"Stopped. {saved} is saved, and the same command goes on from there.")

    def state_dict(self) -> dict[str, Any]:
        return {name: metric.state_dict() for name, metric in self.metrics.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.loaded_metrics = state_dict


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint can be read to its end."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True
