import json
import re
import time

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents

from custom.data.dataset import memory_bytes
from custom.engine.handlers import EvaluationSummary, Forecast, MetricsLog, StopOnNaN, TrainingSummary
from custom.errors import BadInput
from custom.evaluation.report import duration


def engine(seen: list | None = None) -> Engine:
    return Engine(lambda engine, batch: (seen if seen is not None else []).append(batch))


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


def test_a_loss_or_weights_that_are_nan_stop_with_the_names_and_the_batch(tmp_path):
    run = engine()
    run.register_events(*IterationEvents)
    run.network = torch.nn.Linear(2, 1)
    StopOnNaN(str(tmp_path / "run")).attach(run)
    run.state.iteration, run.state.output = 7, {"loss": torch.tensor(1.0)}
    run.state.batch = {"case": ["a.nii", "a.nii", "b.nii"], "image": torch.ones(3), "label": torch.zeros(3), "more": 1}
    for event in (IterationEvents.LOSS_COMPLETED, Events.ITERATION_COMPLETED):
        run.fire_event(event)
    assert not (tmp_path / "run").exists()
    told = r"in iteration 7, with the cases a\.nii, b\.nii;.+nan_batch_rank=0\.pt"
    run.state.output = {"loss": torch.tensor(float("nan"))}
    with pytest.raises(BadInput, match=f"The loss is nan {told}"):
        run.fire_event(IterationEvents.LOSS_COMPLETED)
    dump = torch.load(tmp_path / "run" / "nan_batch_rank=0.pt", weights_only=True)
    assert dump["case"] == run.state.batch["case"] and torch.equal(dump["image"], torch.ones(3))
    run.network.weight.data[0, 1] = -float("inf")
    with pytest.raises(BadInput, match=f"The norm of the weights is inf {told}"):
        run.fire_event(Events.ITERATION_COMPLETED)


class Data:
    """Stands for a dataset of which a case was left out."""

    def left_out(self) -> str:
        return "Left out: 1 of 3 cases\n"


def test_summaries_name_the_folders_what_was_left_out_and_the_next_step(capsys):
    run = engine()
    TrainingSummary("runs/a", "runs/a/models", Data()).attach(run)
    run.run([0])
    told = capsys.readouterr().out
    for part in (
        "Weights: runs/a/models/model.pt",
        "To look at: runs/a/report.html\n",
        "Left out: 1 of 3 cases",
        "--bundle_root runs/a --dataset_dir",
    ):
        assert part in told
    run = engine()
    EvaluationSummary("Pictures", "runs/a/evaluation").attach(run)
    run.state.metrics = {"val_l1": 0.25}
    run.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(val_l1=0.25))
    run.run([0])
    assert capsys.readouterr().out == "\nval_l1: 0.2500\nPictures: runs/a/evaluation\n"


def test_a_forecast_is_the_time_that_the_rest_takes(caplog, monkeypatch):
    """By a clock of its own: iterations of 6 s, but for slow ones at the start and a validation between epochs."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def iteration(engine, batch):
        now[0] += 100 if engine.state.iteration <= Forecast.FIRST else 6

    run = Engine(iteration)
    run.add_event_handler(Events.EPOCH_COMPLETED, lambda: now.__setitem__(0, now[0] + 1000))
    Forecast().attach(run)
    with caplog.at_level("INFO"):
        run.run(range(8), max_epochs=100)
    left = 100 * 8 - Forecast.FIRST - Forecast.TIMED
    said = [record.message for record in caplog.records if "to go" in record.message]
    assert len(said) == 1 and f"About {duration(6 * left)} to go: {left} iterations of 6 s" in said[0]
    used, total = map(float, re.search(r"Memory: (\S+) of (\S+) GiB", said[0]).groups())
    assert 0.1 < used < total and total == pytest.approx(memory_bytes() / 2**30, rel=0.01)
