import json

import pytest
import torch
from ignite.engine import Engine, Events

from custom.errors import BadInput
from custom.handlers import LoadCheckpoint, MetricsLog, On, RunState, prepare_batch


def engine(seen: list | None = None) -> Engine:
    return Engine(lambda engine, batch: (seen if seen is not None else []).append(batch))


def test_prepare_batch_numbers_modalities_by_name():
    images = torch.rand(3, 1, 2, 2, 2)
    batch = {"image": images, "label": images + 1, "modality": ["ct", "t1", "ct"]}
    image, target, args, kwargs = prepare_batch(batch, torch.device("cpu"))
    assert torch.equal(image, images) and torch.equal(target["image"], images + 1)
    first, second, third = target["modality"].tolist()
    assert first == third != second
    assert (args, kwargs) == ((), {"return_embedding": True})


def test_on_calls_at_its_event():
    seen, run = [], engine()
    On("EPOCH_COMPLETED", lambda engine: seen.append(engine.state.iteration)).attach(run)
    run.run([0] * 5, max_epochs=2)
    assert seen == [5, 10]


def train(folder, epochs: int, fail_at: int | None = None, resume: bool = True) -> tuple[torch.nn.Module, list]:
    """Train a weight by 1 an iteration, three iterations an epoch; die in an iteration if told to."""
    model, epochs_seen = torch.nn.Linear(1, 1, bias=False), []
    model.weight.data.zero_()

    def step(engine, batch):
        if engine.state.iteration == fail_at:
            raise RuntimeError("killed")
        model.weight.data += 1

    run = Engine(step)
    run.state.max_epochs = epochs
    run.add_event_handler(Events.EPOCH_STARTED, lambda engine: epochs_seen.append(engine.state.epoch))
    RunState(folder, {"model": model}, resume).attach(run)
    try:
        run.run([0] * 3, max_epochs=epochs)
    except RuntimeError:
        assert fail_at is not None
    return model, epochs_seen


def test_a_run_goes_on_from_the_last_epoch_that_was_finished(tmp_path):
    train(tmp_path, epochs=4, fail_at=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt"]
    model, epochs_seen = train(tmp_path, epochs=12)
    assert epochs_seen == list(range(3, 13)) and model.weight.item() == 36
    # The newest by number, not by name; those from before the restart are cleared away too.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_epoch=11.pt", "checkpoint_epoch=12.pt"]


def test_resume_false_starts_anew(tmp_path):
    train(tmp_path, epochs=2)
    model, epochs_seen = train(tmp_path, epochs=2, resume=False)
    assert epochs_seen == [1, 2] and model.weight.item() == 6


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 1).state_dict(), tmp_path / "model.pt")
    with pytest.raises(BadInput, match="model.pt can't be loaded"):
        LoadCheckpoint(str(tmp_path / "model.pt"), {"model": torch.nn.Linear(2, 1)})(engine())
    with pytest.raises(BadInput, match="no checkpoint"):
        LoadCheckpoint(str(tmp_path / "other.pt"), {"model": torch.nn.Linear(2, 1)})(engine())


def test_metrics_log_replaces_the_lines_of_epochs_trained_again(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    for first, value in ((0, 1.0), (1, 2.0)):  # the second run starts again after epoch 1
        run, evaluator = engine(), engine()
        run.state.epoch = first
        evaluator.state.metrics = {"val_l1": value}
        evaluator.state.epoch = 2
        MetricsLog(str(path), evaluator, lambda: {"learning_rate": 0.5}).attach(run)
        for epoch in range(first + 1, 4):
            run.state.epoch, run.state.max_epochs, run.state.iteration = epoch, 3, 10 * epoch
            run.state.metrics = {"loss": value}
            run.fire_event(Events.EPOCH_COMPLETED)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["epoch"], line["loss"], line.get("val_l1")) for line in lines] == [
        (1, 1.0, None),
        (2, 2.0, 2.0),
        (3, 2.0, None),
    ]
    assert all(line["learning_rate"] == 0.5 and line["iteration"] == 10 * line["epoch"] for line in lines)
