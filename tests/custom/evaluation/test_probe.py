"""The probe of a pre-training: its linear model against least squares, rank and spread by hand, and in a run."""

import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.transforms import Compose, NormalizeIntensityd

from custom.data.loading import LoadScand
from custom.errors import BadInput
from custom.evaluation.probe import KEPT, RIDGE, Embedding, Probe, at, chosen, ridge_accuracy, spread
from custom.loss import DisruptiveLoss
from tests.conftest import autoencoder

STAGES = ("decoder5", "decoder4", "decoder3", "decoder2", "decoder1")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_linear_model_is_that_of_least_squares_with_balanced_classes():
    x, others = normal(90, 5) * 3 + 7, normal(60, 5, seed=1) * 3 + 7
    y, truth = (((part[:, 0] > 7).long() + 2 * (part[:, 1] > 9)) * 5 for part in (x, others))
    mean, std = x.mean(0), x.std(0)
    counts = {int(id): int((y == id).sum()) for id in y.unique()}
    assert len(set(counts.values())) > 1
    # The constant is one more feature, and shrunk as the others are.
    a, b = (np.column_stack([(part - mean) / std, np.ones(len(part))]) for part in (x, others))
    known = np.array(sorted(counts))
    # A ridge is a row more of each feature, whose target is 0.
    root = np.array([1 / counts[int(id)] for id in y])[:, None] ** 0.5
    rows = np.vstack([root * a, RIDGE**0.5 * np.eye(a.shape[1])])
    targets = np.vstack([root * (y.numpy()[:, None] == known), np.zeros((a.shape[1], len(known)))])
    told = known[(b @ np.linalg.lstsq(rows, targets, rcond=None)[0]).argmax(1)]
    recalls = [(told[truth.numpy() == id] == id).mean() for id in known if (truth == id).any()]
    assert ridge_accuracy(x, y, others, truth) == pytest.approx(np.mean(recalls))
    assert 0.5 < np.mean(recalls) < 1


def test_features_that_tell_nothing_give_a_guess_and_a_constant_one_does_no_harm():
    y, truth = torch.arange(300) % 3, torch.arange(600) % 3
    constant = torch.ones(300, 1, dtype=torch.float64)
    x, others = torch.cat([normal(300, 4), constant], 1), torch.cat([normal(600, 4, seed=1), constant.repeat(2, 1)], 1)
    assert ridge_accuracy(x, y, others, truth) == pytest.approx(1 / 3, abs=0.08)
    x[:, 2] += 9 * y
    others[:, 2] += 9 * truth
    assert ridge_accuracy(x, y, others, truth) > 0.6
    # A class that the others lack does not count, nor does one that was not fitted.
    assert ridge_accuracy(x, y, others[truth == 2], truth[truth == 2]) > 0.95
    assert ridge_accuracy(x[y > 0], y[y > 0], others, truth) > 0.95


def test_a_feature_lies_where_its_voxel_is():
    places = torch.tensor([[0, 0, 0], [7, 3, 1], [4, 2, 3]])
    stage = torch.arange(4 * 2 * 2).reshape(1, 4, 2, 2)
    assert at(stage, places, (8, 4, 4)).flatten().tolist() == [0, 3 * 4 + 2 * 1 + 0, 2 * 4 + 2 * 1 + 1]


def test_voxels_of_each_class_are_chosen_alike():
    label = torch.zeros(20, 20, 20, dtype=torch.uint8)
    label[:3, :3, :3] = 4
    places = chosen(label, torch.Generator().manual_seed(0))
    assert label[tuple(places.T)].tolist() == [0] * 100 + [4] * 27
    assert len(places.unique(dim=0)) == 127


def test_rank_and_spread_by_hand():
    modalities = torch.tensor([0, 0, 1, 1])
    square = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])  # two directions alike, and the mean is 0
    found = spread(square * torch.tensor([[1.0], [2], [3], [4]]), modalities)
    assert found == pytest.approx({"embedding_rank": 2, "embedding_spread": 1, "embedding_modalities": 2})
    same = spread(torch.ones(4, 3), modalities)
    assert same == pytest.approx({"embedding_rank": 1, "embedding_spread": 0, "embedding_modalities": 0}, abs=1e-6)
    # Mean of the four: (1/2, 1/2), whose square is 1/2.
    two = spread(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), modalities)
    assert two == pytest.approx({"embedding_rank": 1, "embedding_spread": 0.5, "embedding_modalities": 1})
    assert "embedding_modalities" not in spread(square, torch.zeros(4))


def test_embeddings_of_an_epoch_are_kept_and_a_collapse_is_said(caplog):
    metric = Embedding()
    for number in range(KEPT):
        metric.update((normal(2, 3, seed=number).float(), torch.tensor([number % 2, 1])))
    assert metric.embeddings.shape == (KEPT, 3) and metric.modalities.shape == (KEPT,)
    assert torch.equal(metric.embeddings[-2:], normal(2, 3, seed=KEPT - 1).float())
    found = metric.compute()
    assert (
        found["embedding_rank"] == pytest.approx(3, abs=0.05) and found["embedding_spread"] > 0.95 and not caplog.text
    )
    again = Embedding()
    again.load_state_dict(metric.state_dict())
    assert again.compute() == found
    metric.reset()
    batch = torch.ones(1, 3)
    metric.update((batch, torch.tensor([1])))
    batch.zero_()  # as a step that is replayed overwrites its outputs
    metric.compute()
    assert not caplog.text  # one embedding is no collapse
    for _ in range(20):
        metric.update((torch.ones(1, 3), torch.tensor([1])))
    metric.compute()
    assert "The representation has collapsed" in caplog.text and "--contrastive_weight 0" in caplog.text


@pytest.mark.parametrize("modalities, rate", [([0, 0], 4e-4), ([0, 1], 0.1)], ids=["one modality", "a high rate"])
def test_a_pre_training_that_collapses_says_so(modalities, rate, caplog):
    torch.manual_seed(0)
    network, loss, metric = autoencoder().train(), DisruptiveLoss(), Embedding()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    scans = torch.nn.functional.interpolate(torch.randn(4, 1, 8, 4, 4), scale_factor=8, mode="trilinear")
    names = torch.tensor(modalities)
    for step in range(16):
        if step in (0, 8):
            metric.reset()
            assert "collapsed" not in caplog.text
        images = scans[torch.randperm(4)[:2]]
        prediction = network(images + 0.3 * torch.randn_like(images))
        optimizer.zero_grad()
        loss(prediction, {"image": images, "modality": names}).backward()
        optimizer.step()
        metric.update((prediction[1], names))
        if step in (7, 15):
            metric.compute()
    assert "The representation has collapsed" in caplog.text


@pytest.fixture
def probe(labelled_lists, phantoms):
    def make(datalist=labelled_lists["fetal"], interval=2, **more):
        transforms = Compose([LoadScand("image"), NormalizeIntensityd("image", nonzero=True)])
        folder, known = str(phantoms / "fetal"), ["t2"]
        return Probe(autoencoder(), STAGES, interval, str(datalist), folder, transforms, known, (64, 32, 32), **more)

    return make


def test_a_probe_at_its_epochs_changes_nothing_and_gives_the_same_again(probe):
    made = probe()
    engine = Engine(lambda engine, batch: None)
    made.attach(engine)
    seen = []
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(e.state.metrics.get("probe_accuracy")))
    before = {name: value.clone() for name, value in made.network.state_dict().items()}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    engine.run([0], max_epochs=3)
    assert seen[0] is None and seen[1] == seen[2] and 1 / 8 < seen[1] <= 1
    assert torch.equal(torch.get_rng_state(), random) and made.network.training
    assert not any(hooks for name in STAGES for hooks in [made.network.get_submodule(name)._forward_hooks])
    assert all(torch.equal(value, before[name]) for name, value in made.network.state_dict().items())


def test_no_list_no_probe_and_one_without_common_classes_is_refused(probe, labelled_lists, tmp_path):
    engine = Engine(lambda engine, batch: None)
    nothing = probe()
    nothing.datalist = None
    nothing.attach(engine)
    engine.run([0], max_epochs=2)
    assert engine.state.metrics == {}
    content = json.loads(labelled_lists["fetal"].read_text())
    content["training"][0]["modality"] = "pet"
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match="has the modality .pet"):
        probe(tmp_path / "list.json").load(engine)


@pytest.mark.parametrize(
    "stages, told",
    [(["decoder9"], "no submodule 'decoder9'; did you mean `decoder"), (["decoder1", "norm"], "no submodule 'norm'")],
)
def test_stages_that_are_not_there_are_refused_before_the_training(stages, told, probe):
    made = probe()
    made.stages = stages
    with pytest.raises(BadInput, match=told):
        made.load(None)
    assert not made.crops


def test_a_stage_that_is_not_called_is_refused(probe):
    made = probe()
    made.network.spare = torch.nn.Identity()
    made.stages = ["decoder1", "spare"]
    made.load(None)
    with pytest.raises(BadInput, match="does not call each of --probe_stages"):
        made.accuracy()
    assert made.network.training
