import contextlib
import inspect
import logging
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from monai.engines import SupervisedTrainer
from monai.optimizers import WarmupCosineSchedule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from custom.engine.resume import RunState
from custom.errors import BadInput


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def train(folder, epochs: int, stop_at: int | None = None, stop=None, batches: int = 3, summary_writer=None, **options):
    """Train a weight by a random number an iteration, doing `stop` in one; return the model and the epochs' losses."""
    model, log, loss = torch.nn.Linear(1, 1, bias=False), [], Average()
    model.weight.data.zero_()

    def step(engine, batch):
        if engine.state.iteration == stop_at:
            stop()
        model.weight.data += torch.rand(()) + np.random.rand()
        if summary_writer is not None:
            summary_writer.add_scalar("weight", model.weight.item(), engine.state.iteration)
        return model.weight.item()

    run = Engine(step)
    run.state.max_epochs, run.state.epoch_length = epochs, batches  # as MONAI's trainers do
    loss.attach(run, "loss")
    run.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: log.append((engine.state.epoch, engine.state.metrics)))
    RunState(folder, {"model": model}, {"loss": loss}, summary_writer=summary_writer, **options).attach(run)
    run.run([0] * batches, max_epochs=epochs)
    return model, [(epoch, metrics["loss"]) for epoch, metrics in log]


def kill():
    raise Killed


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(autouse=True)
def signal_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("stop_at", range(1, 13))
def test_a_run_killed_in_any_iteration_ends_as_if_it_had_not_been(tmp_path, stop_at):
    whole, log = train(tmp_path / "whole", epochs=4)
    with pytest.raises(Killed):
        train(tmp_path / "killed", epochs=4, stop_at=stop_at, stop=kill)
    done = (stop_at - 1) // 3
    model, rest = train(tmp_path / "killed", epochs=4)
    assert torch.equal(model.weight, whole.weight)
    assert rest == log[done:]
    assert names(tmp_path / "killed") == ["checkpoint_iteration=12.pt", "checkpoint_iteration=9.pt"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stop_at", [1, 5, 6, 12])
def test_a_signal_saves_after_the_iteration_and_the_run_goes_on_from_there(tmp_path, stop_at, number):
    whole, log = train(tmp_path / "whole", epochs=4)
    saved = f"checkpoint_iteration={stop_at}.pt"
    with pytest.raises(SystemExit, match=f"{saved} is saved, and the same command"):
        train(tmp_path / "told", epochs=4, stop_at=stop_at, stop=lambda: os.kill(os.getpid(), number))
    assert saved in names(tmp_path / "told")
    # A second Ctrl-C ends the process; a second SIGTERM does not, as a scheduler and torchrun may each send one.
    assert (signal.getsignal(number) is signal.SIG_DFL) is (number == signal.SIGINT)
    iterations = []
    model, rest = train(tmp_path / "told", epochs=4, stop_at=stop_at + 1, stop=lambda: iterations.append(1))
    assert len(iterations) == (stop_at < 12)  # no iteration is done twice
    assert torch.equal(model.weight, whole.weight)
    assert rest == log[stop_at // 3 :]  # the mean of the interrupted epoch too


def test_the_newest_is_by_number_and_what_a_user_deleted_is_not_missed(tmp_path):
    train(tmp_path, epochs=3)
    (tmp_path / "checkpoint_iteration=6.pt").unlink()
    _, log = train(tmp_path, epochs=5)
    assert [epoch for epoch, _ in log] == [4, 5]
    assert names(tmp_path) == ["checkpoint_iteration=12.pt", "checkpoint_iteration=15.pt"]


@pytest.mark.parametrize("damage", ["nothing", "a part", "all but a byte", "another bit"])
def test_of_a_damaged_checkpoint_the_one_before_is_used_with_a_warning(tmp_path, caplog, damage):
    whole, _ = train(tmp_path / "whole", epochs=4)
    train(tmp_path / "run", epochs=3)
    path = tmp_path / "run" / "checkpoint_iteration=9.pt"
    content = bytearray(path.read_bytes())
    if damage == "another bit":  # of the weight: torch loads such a file without a word
        weight = torch.load(path, weights_only=True)["model"]["weight"].numpy().tobytes()
        content[content.index(weight)] ^= 1
        path.write_bytes(content)
        assert torch.load(path, weights_only=True)["model"]["weight"].numpy().tobytes() != weight
    else:
        path.write_bytes(content[: {"nothing": 0, "a part": 100, "all but a byte": -1}[damage]])
    model, log = train(tmp_path / "run", epochs=4)
    assert [epoch for epoch, _ in log] == [3, 4] and torch.equal(model.weight, whole.weight)
    assert f"{path} is damaged; checkpoint_iteration=6.pt, the one before it, is used." in caplog.text
    for name in names(tmp_path / "run"):
        (tmp_path / "run" / name).write_bytes(b"damaged")
    with pytest.raises(BadInput, match="is damaged and there is no other checkpoint; train anew"):
        train(tmp_path / "run", epochs=4)


def test_a_run_that_is_over_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        assert "Nothing is left to train" not in caplog.text
        model, log = train(tmp_path, epochs=2)
    assert "Nothing is left to train: raise --max_epochs" in caplog.text and not log


def test_resume_false_starts_anew_and_replaces_what_was_there(tmp_path):
    train(tmp_path, epochs=4)
    _, log = train(tmp_path, epochs=2, resume=False)
    assert [epoch for epoch, _ in log] == [1, 2]
    assert names(tmp_path) == ["checkpoint_iteration=3.pt", "checkpoint_iteration=6.pt"]


def test_what_a_kill_left_of_a_checkpoint_goes_with_the_next_one(tmp_path):
    train(tmp_path, epochs=2)
    for name in ("checkpoint_iteration=1.pt", "checkpoint_iteration=8.pt.part"):
        (tmp_path / name).write_bytes(b"")
    train(tmp_path, epochs=3)
    assert names(tmp_path) == ["checkpoint_iteration=6.pt", "checkpoint_iteration=9.pt"]


def test_a_run_with_another_number_of_iterations_is_not_gone_on_with(tmp_path):
    train(tmp_path, epochs=2)
    with pytest.raises(BadInput, match="a run with 3 iterations an epoch, and now there are 4; give the data list"):
        train(tmp_path, epochs=4, batches=4)


def test_the_schedule_of_more_epochs_is_as_long_as_they_are(tmp_path):
    """The checkpoint has the length of the schedule of fewer, whose cosine would rise again."""
    for epochs in (2, 4):
        model = torch.nn.Linear(1, 1)
        schedule = WarmupCosineSchedule(torch.optim.SGD(model.parameters(), lr=1.0), epochs, t_total=3 * epochs)
        run = Engine(lambda engine, batch, schedule=schedule: schedule.step())
        run.state.max_epochs, run.state.epoch_length = epochs, 3
        RunState(tmp_path, {"model": model, "lr_scheduler": schedule}).attach(run)
        run.run([0] * 3, max_epochs=epochs)
        assert (schedule.t_total, schedule.warmup_steps) == (3 * epochs, epochs)
        assert run.state.iteration == 3 * epochs and schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


class Client:
    """As a client of federated learning: a round with the server's weights, on a trainer that goes on."""

    train_workflow = None

    def __init__(self, folder, epochs: int) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        schedule = WarmupCosineSchedule(optimizer, warmup_steps=0, t_total=3 * epochs)
        self.trainer = Engine(lambda engine, batch: self.model.weight.data.add_(1.0))
        RunState(folder, {"model": self.model, "lr_scheduler": schedule}).attach(self.trainer)

    def round(self, weight: float) -> float:
        self.model.weight.data.fill_(weight)
        self.trainer.state.max_epochs, self.trainer.state.epoch_length = self.trainer.state.epoch + 1, 3
        self.trainer.run([0] * 3)
        return self.model.weight.item()


def test_rounds_of_federated_learning_keep_the_server_s_weights_and_the_schedule(tmp_path, monkeypatch):
    client = Client(tmp_path, epochs=2)
    assert [client.round(weight) for weight in (10, 20)] == [13, 23]
    assert client.trainer.state.epoch == 2
    with pytest.raises(BadInput, match="ends after 9 iterations and the schedule of its learning rate after 6; give"):
        client.round(30)
    # A site that is started again would begin its schedule anew.
    monkeypatch.setitem(sys.modules, "monai.fl.client", SimpleNamespace(MonaiAlgo=Client))
    with pytest.raises(BadInput, match="holds a training already, and a site of a federation starts with"):
        Client(tmp_path, epochs=2).round(10)


def test_signals_are_those_of_before_when_the_run_is_over(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(tmp_path, epochs=1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_tensorboard_forgets_what_is_logged_again(tmp_path):
    """As it reads the files of three starts: one killed before its first checkpoint, one killed after, one whole."""
    for stop_at in (3, 5, None):
        with SummaryWriter(str(tmp_path / "log")) as writer, contextlib.suppress(Killed):
            train(tmp_path, epochs=3, stop_at=stop_at, stop=kill, summary_writer=writer)
    found = EventAccumulator(str(tmp_path / "log")).Reload().Scalars("weight")
    assert [event.step for event in found] == list(range(1, 10))


def test_the_state_of_a_gradient_scaler_is_saved(tmp_path):
    scales = []

    def step(engine, batch):
        scales.append(engine.scaler.get_scale())
        engine.scaler.scale(torch.zeros(1))
        engine.scaler.update(scales[-1] / 2)

    for epochs in (1, 2):  # the second goes on
        run = Engine(step)
        run.state.max_epochs, run.state.epoch_length = epochs, 1
        run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        RunState(tmp_path, {"model": torch.nn.Linear(1, 1)}).attach(run)
        run.run([0], max_epochs=epochs)
    assert scales == [8.0, 4.0]


def test_seeds_differ_and_repeat(tmp_path):
    weights = [train(tmp_path / str(n), epochs=1, seed=seed)[0].weight.item() for n, seed in enumerate((1, 1, 2))]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.skipif(
    "accumulation_steps" not in inspect.signature(SupervisedTrainer).parameters, reason="came with MONAI 1.6"
)
@pytest.mark.parametrize(("told_at", "saved_at"), [(1, 2), (2, 2), (3, 4), (5, 5)])
def test_gradients_that_accumulate_are_not_lost(tmp_path, told_at, saved_at):
    """Epochs of five iterations, a step of the optimizer after the second, the fourth and the fifth."""

    def trainer(folder, stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        data = [{"image": torch.full((1, 1), 2.0), "label": torch.full((1, 1), 9.0)}] * 5
        loss = torch.nn.L1Loss()
        run = SupervisedTrainer(torch.device("cpu"), 2, data, model, optimizer, loss, accumulation_steps=2)
        RunState(folder, {"model": model, "optimizer": optimizer}).attach(run)
        if stop_at:
            run.add_event_handler(Events.ITERATION_STARTED(once=stop_at), lambda: os.kill(os.getpid(), signal.SIGTERM))
        return run, model

    run, whole = trainer(tmp_path / "whole")
    run.run()
    with pytest.raises(SystemExit, match=f"iteration={saved_at}.pt"):
        trainer(tmp_path / "told", told_at)[0].run()
    run, model = trainer(tmp_path / "told")
    run.run()
    assert all(torch.equal(p, expected) for p, expected in zip(model.parameters(), whole.parameters(), strict=True))
