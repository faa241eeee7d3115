import json
from itertools import combinations

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines.utils import IterationEvents

from custom.errors import BadInput
from custom.handlers import DisruptBatch, LoadCheckpoint, MetricsLog, On, StopOnNaN, prepare_batch


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


def test_a_batch_is_disrupted_as_the_global_seed_says_and_keeps_its_originals():
    prepare, images = DisruptBatch(disruptions=["noise"]), torch.rand(2, 1, 16, 16, 16)
    results = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        batch = {"image": images, "modality": ["ct", "t1"]}
        image, target, *_ = prepare(batch, torch.device("cpu"))
        assert torch.equal(target["image"], images) and target["modality"].shape == (2,)
        assert batch["image"] is image and batch["label"] is target["image"]  # what a NaN is looked for in
        noise = image - images
        assert noise.std().item() == pytest.approx(0.1**0.5, rel=0.05) and not torch.equal(noise[0], noise[1])
        results.append(noise)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_batch_is_flipped_along_any_axis_and_restored_as_flipped():
    image = torch.rand(1, 4, 4, 4)
    flips = [axes for count in range(4) for axes in combinations((1, 2, 3), count)]
    np.random.seed(0)
    batch = {"image": image.expand(400, -1, -1, -1, -1), "modality": ["ct"] * 400}
    flipped, target, *_ = DisruptBatch(flip_probability=0.5, disruptions=[])(batch, torch.device("cpu"))
    assert torch.equal(flipped, target["image"]) and type(flipped) is torch.Tensor
    counts = [sum(torch.equal(one, image.flip(axes)) for one in flipped) for axes in flips]
    assert sum(counts) == 400 and min(counts) > 25  # of 50 each


def test_on_calls_at_its_event():
    seen, run = [], engine()
    On("EPOCH_COMPLETED", lambda engine: seen.append(engine.state.iteration)).attach(run)
    run.run([0] * 5, max_epochs=2)
    assert seen == [5, 10]


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
