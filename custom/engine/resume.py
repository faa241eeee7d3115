"""A run that is killed at any moment and started again ends as if it had never been interrupted."""

import logging
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint
from ignite.metrics import Metric
from ignite.utils import manual_seed
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from custom.data.dataset import EpochSampler, derive_seed
from custom.engine.checkpoint import AtomicSaver, CheckedCheckpointLoader, is_whole
from custom.engine.config_check import federated_client
from custom.errors import BadInput

logger = logging.getLogger(__name__)


class RunState:
    """Save the state of a training run after every epoch, and go on from it when the run is started again.

    Everything random in an iteration depends on the seed and the iteration's number alone, so that no random state has
    to be saved. The last two checkpoints are kept, and a damaged one is noticed. SIGTERM and Ctrl-C save after the
    current iteration, or the last one whose gradients it accumulates, and end the process; a second Ctrl-C ends it at
    once.

    Attach it after all handlers whose work should be in the state, such as validation.

    A trainer that goes on by itself, as in each round of federated learning, loads nothing.

    Args:
        run_dir: folder of the run; a run is resumed if it holds a `checkpoint_iteration=N.pt`.
        objects: what has a state beside the trainer: model, optimizer, ...
        metrics: of the training, which an interrupted epoch goes on with.
        seed: of what is random in the main process; what is random in a sample is seeded by `CaseDataset`.
        resume: False starts anew, whatever the folder holds, and its checkpoints are replaced.
        map_location: device to load to.
        summary_writer: TensorBoard's, which is told to forget what was logged after the checkpoint.

    Raises:
        BadInput: when no checkpoint can be read, or it is of another network or data list; at a site of a federation
            when there is one, and when a round goes beyond the schedule of the learning rate.
        SystemExit: with a sentence, when the process was told to stop.
    """

    def __init__(
        self,
        run_dir: str | Path,
        objects: dict[str, Any],
        metrics: Mapping[str, Metric] | None = None,
        seed: int = 0,
        resume: bool = True,
        map_location: Any = None,
        summary_writer: SummaryWriter | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.objects = objects
        self.metrics = dict(metrics or {})
        self.loaded_metrics: Mapping[str, Any] = {}
        self.seed = seed
        self.resume = resume
        self.map_location = map_location
        self.summary_writer = summary_writer
        self.last: Path | None = None  # the checkpoint that was saved or loaded last
        self.told_to_stop = False

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.EPOCH_STARTED, self.skip_what_was_done)
        engine.add_event_handler(Events.ITERATION_STARTED, self.reseed)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.stop_if_told)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.COMPLETED, self.end)

    def start(self, engine: Engine) -> None:
        """Load the last checkpoint, if there is one, and listen to signals."""
        # The trainer's handlers, and so this one, are made before it is.
        scaler = getattr(engine, "scaler", None)
        self.checkpoint = Checkpoint(
            {**self.objects, "trainer": engine, "metrics": self} | ({"scaler": scaler} if scaler else {}),
            AtomicSaver(self.run_dir),
            filename_pattern="checkpoint_iteration={global_step}.pt",
            global_step_transform=lambda engine, _: engine.state.iteration,
            n_saved=None,
        )
        if self.resume and not engine.state.iteration:  # else it goes on by itself, as in a round of federated learning
            self.load(engine)
        self.check_schedule(engine)
        if self.summary_writer is not None:
            again = Event(session_log=SessionLog(status=SessionLog.START))
            writer: Any = self.summary_writer.file_writer  # torch declares that it is None
            writer.add_event(again, engine.state.iteration + 1)
        self.listening = {}
        if threading.current_thread() is threading.main_thread():
            self.listening = {
                number: signal.signal(number, self.tell_to_stop) for number in (signal.SIGTERM, signal.SIGINT)
            }

    def load(self, engine: Engine) -> None:
        files = sorted(self.run_dir.glob("checkpoint_iteration=*.pt"), key=lambda file: int(file.stem.split("=")[1]))
        if not files:
            return
        if federated_client() is not None:
            raise BadInput(
                f"{self.run_dir} holds a training already, and a site of a federation starts with the server's "
                f"weights; give it another output_dir, or resume False to replace what is there."
            )
        while not is_whole(files[-1]):
            damaged = files.pop()
            if not files:
                raise BadInput(
                    f"{damaged} is damaged and there is no other checkpoint; train anew in another --output_dir, or "
                    f"here with --resume False."
                )
            logger.warning(f"{damaged} is damaged; {files[-1].name}, the one before it, is used.")
        self.last, state, iterations = files[-1], engine.state, engine.state.epoch_length
        schedule = vars(self.objects.get("lr_scheduler", self))
        lengths = {name: schedule[name] for name in ("t_total", "warmup_steps") if name in schedule}
        CheckedCheckpointLoader(str(self.last), self.checkpoint.to_save, map_location=self.map_location)(engine)
        schedule.update(lengths)  # those of more epochs, where there are more
        if state.epoch_length != iterations:
            raise BadInput(
                f"{self.last} is of a run with {state.epoch_length} iterations an epoch, and now there are "
                f"{iterations}; give the data list, batch size and number of processes that it was started with, or "
                f"start anew in another --output_dir."
            )
        logger.info(f"Resuming from {self.last}: {state.epoch} of {state.max_epochs} epochs are done.")
        if state.epoch >= state.max_epochs:
            logger.info("Nothing is left to train: raise --max_epochs, or start anew in another --output_dir.")

    def check_schedule(self, engine: Engine) -> None:
        """Refuse a training that goes beyond the schedule of its learning rate, as rounds of federated learning may."""
        end = engine.state.max_epochs * engine.state.epoch_length
        scheduled = getattr(self.objects.get("lr_scheduler"), "t_total", end)
        if end > scheduled:
            raise BadInput(
                f"The training ends after {end} iterations and the schedule of its learning rate after "
                f"{scheduled}; give the epochs of all rounds as schedule_epochs, or in pre-training the "
                f"iterations of all as max_iterations."
            )

    def skip_what_was_done(self, engine: Engine) -> None:
        """Let an interrupted epoch go on where it was, its metrics too, which have just been reset."""
        loader, done = engine.state.dataloader, engine.state.iteration % engine.state.epoch_length
        if isinstance(getattr(loader, "sampler", None), EpochSampler):
            loader.sampler.start = done * loader.batch_size
        if done:
            for name, metric in self.metrics.items():
                metric.load_state_dict(self.loaded_metrics[name])

    def reseed(self, engine: Engine) -> None:
        manual_seed(derive_seed(self.seed, idist.get_rank(), engine.state.iteration))

    def tell_to_stop(self, number: int, frame: Any) -> None:
        # Not by way of the log, which may be what the signal has interrupted.
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this iteration.\n".encode())
        if number == signal.SIGINT:  # a scheduler and torchrun may each send a SIGTERM
            signal.signal(number, signal.SIG_DFL)
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
        saved = self.run_dir / self.checkpoint.last_checkpoint
        if idist.get_rank() == 0:
            for file in set(self.run_dir.glob("checkpoint_iteration=*")) - {saved, self.last}:
                file.unlink()
        self.last = saved
        if stop:
            raise SystemExit(f"Stopped. {saved} is saved, and the same command goes on from there.")

    def end(self, engine: Engine) -> None:
        for number, handler in self.listening.items():
            signal.signal(number, handler)

    def state_dict(self) -> dict[str, Any]:
        return {name: metric.state_dict() for name, metric in self.metrics.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.loaded_metrics = state_dict
