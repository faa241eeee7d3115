import os
import signal

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from monai.engines import SupervisedTrainer

from custom.errors import BadInput
from custom.resume import RunState, Saver


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def train(folder, epochs: int, stop_at: int | None = None, stop=None, **options) -> tuple[torch.nn.Module, list]:
    """Train a weight by a random number an iteration, three iterations an epoch; do `stop` in an iteration."""
    model, log, loss = torch.nn.Linear(1, 1, bias=False), [], Average()
    model.weight.data.zero_()

    def step(engine, batch):
        if engine.state.iteration == stop_at:
            stop()
        model.weight.data += torch.rand(()) + np.random.rand()
        return model.weight.item()

    run = Engine(step)
    run.state.max_epochs = epochs
    loss.attach(run, "loss")
    run.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: log.append((engine.state.epoch, engine.state.metrics)))
    RunState(folder, {"model": model}, {"loss": loss}, **options).attach(run)
    run.run([0] * 3, max_epochs=epochs)
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
    assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the process
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


@pytest.mark.parametrize("size", [0, 100, -1])
def test_of_a_truncated_checkpoint_the_one_before_is_used_with_a_warning(tmp_path, caplog, size):
    whole, _ = train(tmp_path / "whole", epochs=4)
    train(tmp_path / "run", epochs=3)
    path = tmp_path / "run" / "checkpoint_iteration=9.pt"
    path.write_bytes(path.read_bytes()[:size])
    model, log = train(tmp_path / "run", epochs=4)
    assert [epoch for epoch, _ in log] == [3, 4] and torch.equal(model.weight, whole.weight)
    assert f"{path} is damaged; checkpoint_iteration=6.pt, the one before it, is used." in caplog.text
    for name in names(tmp_path / "run"):
        (tmp_path / "run" / name).write_bytes(b"damaged")
    with pytest.raises(BadInput, match="is damaged and there is no other checkpoint; train anew"):
        train(tmp_path / "run", epochs=4)


def test_resume_false_starts_anew(tmp_path):
    train(tmp_path, epochs=2)
    _, log = train(tmp_path, epochs=2, resume=False)
    assert [epoch for epoch, _ in log] == [1, 2]


def test_seeds_differ_and_repeat(tmp_path):
    weights = [train(tmp_path / str(n), epochs=1, seed=seed)[0].weight.item() for n, seed in enumerate((1, 1, 2))]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full to write to")
def test_a_full_disk_is_told_in_a_sentence_and_leaves_what_was_saved(tmp_path, monkeypatch):
    saver = Saver(str(tmp_path))
    saver({"a": torch.ones(3)}, "model.pt")
    before = (tmp_path / "model.pt").read_bytes()

    def save(checkpoint, file):
        with open("/dev/full", "wb") as full:
            torch.save(checkpoint, full)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(BadInput, match=r"model\.pt could not be saved, with \d+ MB free"):
        saver({"a": torch.zeros(3)}, "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before and names(tmp_path) == ["model.pt"]


@pytest.mark.parametrize(("told_at", "saved_at"), [(1, 2), (2, 2), (3, 4), (5, 5)])
def test_gradients_that_accumulate_are_not_lost(tmp_path, told_at, saved_at):
    """Epochs of five iterations, a step of the optimizer after the second, the fourth and the fifth."""

    def trainer(folder, stop_at=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        data = [{"image": torch.full((1, 1), float(n)), "label": torch.ones(1, 1)} for n in range(5)]
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
