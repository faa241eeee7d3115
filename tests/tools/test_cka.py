"""Tests of tools.cka: the measure by hand and by its definition, which features are compared, and the command line."""

from __future__ import annotations

import csv
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR
from monai.transforms import LoadImage
from PIL import Image

from custom.engine.checkpoint import AtomicSaver
from custom.files import read_json, write_json
from tests.conftest import PRETRAINING, ROOT, autoencoder, segmentation_network
from tests.custom.test_published import fill, manifest
from tools.cka import STAGES, cka, compare, hsic, load, main, stage_features

FETA = ROOT / "bundles" / "feta_mri_segmentation"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(x: torch.Tensor, y: torch.Tensor) -> float:
    """Song et al. 2012, equation 5, with its kernels of samples by samples."""
    n, one = len(x), np.ones(len(x))
    k, m = ((features @ features.T).numpy() * (1 - np.eye(n)) for features in (x, y))
    terms = np.trace(k @ m), one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)), 2 / (n - 2) * (one @ k @ m @ one)
    return (terms[0] + terms[1] - terms[2]) / (n * (n - 3))


def test_cka_of_four_samples_by_hand():
    """Centred, both are 1/2 or -1/2, so that each diagonal is 1/4: hsic(x, x) = (1 - 2 * 1/4 + 1/6) / 4 = 1/6, and
    hsic(x, y) = (0 - 2 * 1/4 + 1/6) / 4 = -1/12."""
    x, y = torch.tensor([[0.0], [0], [1], [1]]), torch.tensor([[0.0], [1], [0], [1]])
    assert hsic(x - 0.5, x - 0.5).item() == pytest.approx(1 / 6)
    assert cka(x, y) == pytest.approx(-1 / 2) and cka(x, 1 - x) == pytest.approx(1)


def test_cka_is_that_of_the_definition():
    x, y = normal(9, 5), normal(9, 3, seed=1) + 7
    y[:, 0] += x[:, 0]
    expected = by_definition(x, y) / (by_definition(x, x) * by_definition(y, y)) ** 0.5
    assert cka(x, y) == pytest.approx(expected) and 0.05 < abs(expected) < 0.95


def test_the_estimate_has_no_bias():
    """On average over all small samples of a larger one it is what the larger one gives."""
    x, y = normal(7, 3), normal(7, 2, seed=1)
    chosen = [list(four) for four in itertools.combinations(range(7), 4)]
    small = [hsic(x[four] - x[four].mean(0), y[four] - y[four].mean(0)).item() for four in chosen]
    assert np.mean(small) == pytest.approx(hsic(x - x.mean(0), y - y.mean(0)).item())


def test_cka_forgets_rotation_scale_and_shift_and_nothing_else():
    x, y = normal(50, 6), normal(50, 6).tanh() + normal(50, 6, seed=1)
    rotation = torch.linalg.qr(normal(6, 6, seed=2))[0]
    assert cka(x, x) == pytest.approx(1) and cka(x, 3 * x @ rotation - 5) == pytest.approx(1)
    assert cka(x, 3 * y @ rotation - 5) == pytest.approx(cka(x, y)) and 0.1 < cka(x, y) < 0.9
    assert cka(x, y) == pytest.approx(cka(y, x))
    assert cka(x, x * torch.tensor([9, 1, 1, 1, 1, 1])) < 0.9


def test_independent_features_have_a_cka_of_zero_also_with_more_channels_than_samples():
    for n, channels in ((2000, 5), (100, 400)):
        x, y = normal(n, channels), normal(n, channels, seed=1)
        assert abs(cka(x, y)) < 0.03
    x, y = x - x.mean(0), y - y.mean(0)
    plain = (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    assert plain.item() == pytest.approx(400 / 500, abs=0.02)  # what the docstring says of the plain estimate


@pytest.mark.parametrize("kind", [SwinUNETR, autoencoder])
def test_features_are_those_that_make_the_output(kind):
    network = (autoencoder() if kind is autoencoder else kind(1, 2, feature_size=12)).eval()
    image = torch.randn(1, 1, 64, 32, 32)
    features = stage_features(network, image)
    hidden = network.swinViT(image, network.normalize)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, hidden, strict=False))
    assert torch.equal(network.out(features[-1]), network(image))
    assert [value.shape[1] // 12 for value in features] == [1, 2, 4, 8, 16, 8, 4, 2, 1, 1]
    assert [value.shape[2] for value in features] == [32, 16, 8, 4, 2, 4, 8, 16, 32, 64]
    if kind is SwinUNETR:
        assert not any(module._forward_hooks for module in network.modules())


def test_features_of_a_residual_encoder_u_net_are_those_that_make_the_output():
    network, image = segmentation_network("resenc").eval(), torch.randn(1, 1, 64, 32, 32)
    features = stage_features(network, image)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(features, network.encoder(image), strict=False))
    assert torch.equal(network.decoder.seg_layers[-1](features[-1]), network(image))
    assert [value.shape[2] for value in features] == [64, 32, 16, 8, 4, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    "backbone, samples", [("swin", [20] * 4 + [4] + [20] * 5), ("resenc", [20] * 5 + [4] + [20] * 5)]
)
def test_both_networks_are_compared_at_the_same_positions(backbone, samples):
    network = segmentation_network(backbone).eval()
    images = [torch.randn(1, 1, 64, 32, 32) for _ in range(2)]
    rows = compare((network, network), images, positions=10, seed=0)
    assert [row.cka for row in rows] == pytest.approx([1] * len(samples))
    assert [row.samples for row in rows] == samples


def seeded(kind: type, seed: int, feature_size: int = 12, **kwargs) -> dict:
    torch.manual_seed(seed)
    return kind(feature_size=feature_size, in_channels=1, **kwargs).state_dict()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Checkpoints of this project and as published, each with weights of its own."""
    folder = tmp_path_factory.mktemp("weights")
    contents = {
        "pre": {"model": seeded(SwinUNETR, 0, out_channels=1), "epoch": 3},
        "fine": {"model": seeded(SwinUNETR, 1, out_channels=8)},
        "wide": seeded(SwinUNETR, 2, 24, out_channels=3),
        "published pre": {"model": fill(manifest("pretrain_fs12"), 0)},
        "published fine": {"state_dict": fill(manifest("finetune_fs12"), 1)},
        "channels": SwinUNETR(in_channels=2, out_channels=8, feature_size=12).state_dict(),
        "encoder": {
            name.removeprefix("swinViT."): value
            for name, value in seeded(SwinUNETR, 0, out_channels=1).items()
            if name.startswith("swinViT.")
        },
        "other": torch.nn.Linear(2, 2).state_dict(),
        "resenc": segmentation_network("resenc", classes=8).state_dict(),
        "resenc pre": autoencoder(backbone="resenc").state_dict(),
    }
    contents["cut"] = {"model": {name: w for name, w in contents["fine"]["model"].items() if "decoder3" not in name}}
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    (folder / "text.pt").write_text("weights")
    return folder


@pytest.fixture
def run(weights, labelled_lists, tmp_path):
    """Compare two checkpoints by the command line; returns the exit status and the rows of the table by stage."""

    def run(checkpoint, other, *more, bundle=FETA, datalist=labelled_lists["fetal"]):
        arguments = [tmp_path / "out", weights / f"{checkpoint}.pt", weights / f"{other}.pt"]
        arguments += ["--bundle", bundle, "--datalist", datalist, "--patch_size", 64, 32, 32, *more]
        status = main([str(argument) for argument in arguments])
        file = tmp_path / "out" / "cka.csv"
        rows = {row["stage"]: row for row in csv.DictReader(file.open())} if file.exists() else {}
        return status, rows

    return run


@pytest.mark.parametrize(
    "checkpoint, bundle, other_bundle",
    [
        *(("pre", PRETRAINING, FETA), ("fine", FETA, FETA), ("published fine", FETA, FETA)),
        *(("resenc pre", PRETRAINING, FETA), ("resenc", FETA, FETA)),
    ],
)
def test_a_checkpoint_is_like_itself_at_every_stage(checkpoint, bundle, other_bundle, run):
    """A pre-training in the other bundle's network too: in eval mode nothing is masked."""
    status, rows = run(checkpoint, checkpoint, "--other_bundle", other_bundle, bundle=bundle)
    up = [f"decoder {number}" for number in range(1, 6)]
    stages = [*(f"stage {number}" for number in range(1, 7)), *up] if "resenc" in checkpoint else list(STAGES)
    assert status == 0 and list(rows) == stages
    assert [float(row["cka"]) for row in rows.values()] == pytest.approx([1] * len(stages))


def test_other_weights_are_less_alike_and_everything_is_written_and_told(run, tmp_path, capsys):
    status, rows = run("fine", "pre", "--other_bundle", PRETRAINING)
    assert status == 0 and all(-0.5 < float(row["cka"]) < 0.999 for row in rows.values())
    printed = capsys.readouterr()
    assert "crops: 100%" in printed.err and "Next: " in printed.out and 'of 1 scans, "validation" of' in printed.out
    table = (tmp_path / "out" / "cka.md").read_text()
    assert table in printed.out and all(f"| {stage} " in table for stage in STAGES)
    assert f"{float(rows['decoder1']['cka']):.3f} |" in table
    assert Image.open(tmp_path / "out" / "cka.png").size > (500, 200)
    before = (tmp_path / "out" / "cka.csv").read_bytes()
    assert run("fine", "pre", "--other_bundle", PRETRAINING)[1] == rows
    assert (tmp_path / "out" / "cka.csv").read_bytes() == before


def test_networks_of_different_widths_and_published_ones_are_compared(run):
    status, rows = run("wide", "published fine", "--samples", 40)
    assert status == 0
    widths = [(row["channels"], row["other_channels"]) for row in rows.values()]
    assert widths == [(str(24 * n), str(12 * n)) for n in (1, 2, 4, 8, 16, 8, 4, 2, 1, 1)]
    assert [int(row["samples"]) for row in rows.values()] == [40] * 4 + [8] + [40] * 5


def test_the_published_networks_are_the_bundles_own(weights):
    network, _ = load(PRETRAINING, weights / "published pre.pt")
    assert not network.normalize and not network.training
    assert load(FETA, weights / "published fine.pt")[0].normalize
    assert type(load(FETA, weights / "fine.pt")[0]) is SwinUNETR


def test_scans_are_preprocessed_as_the_bundle_does_and_not_disrupted(weights, labelled_lists):
    _, parser = load(PRETRAINING, weights / "pre.pt")
    path = labelled_lists["ct"].parent / "images" / "ct_000.nii.gz"
    seen = parser.get_parsed_content("dataset#transform")({"image": str(path), "case": "", "modality": "ct"})["image"]
    scan = LoadImage(ensure_channel_first=True)(path)
    assert torch.allclose(seen.sum(), ((scan.clip(-1000, 1000) + 1000) / 2000).sum())


def test_ids_that_a_training_had_otherwise_can_be_set(weights):
    _, parser = load(PRETRAINING, weights / "pre.pt", {"pixdim_mm": [2, 2, 2]})
    assert parser["pixdim_mm"] == [2, 2, 2]


def test_folders_of_trainings_need_no_settings_and_refuse_others(weights, labelled_lists, tmp_path, capsys):
    folder, state = tmp_path / "run", torch.load(weights / "fine.pt", weights_only=True)["model"]
    shutil.copytree(FETA / "configs", folder / "configs")
    train = read_json(folder / "configs/train.json")
    place = {"datalist": str(labelled_lists["fetal"]), "dataset_dir": str(labelled_lists["fetal"].parent)}
    write_json(folder / "configs/train.json", {**train, **place, "fold": 1})
    record = {"settings": {"pixdim_mm": None}, "overrides": {}}
    write_json(folder / "run.json", [record])
    AtomicSaver(folder / "models", folder)(state, "model.pt")
    arguments = [str(part) for part in (tmp_path / "out", folder, folder, "--patch_size", 64, 32, 32)]
    assert main(arguments) == 0 and "of 1 scans" in capsys.readouterr().out
    assert main([*arguments, "--pixdim_mm", "[2,2,2]"]) == 2
    assert "was trained with pixdim_mm None, and --pixdim_mm gives [2, 2, 2]" in capsys.readouterr().err


WRONG = {
    "no checkpoint": (("fine", "none"), "There is no checkpoint"),
    "no weights": (("fine", "text"), "it is damaged or no PyTorch checkpoint"),
    "another network": (("fine", "other"), "other.pt: These are not the weights of a 3D Swin UNETR"),
    "an encoder": (("fine", "encoder"), "encoder.pt: These weights are an encoder's alone"),
    "a part": (("cut", "fine"), "cut.pt: These weights lack 4 tensors"),
    "other channels": (("fine", "channels"), "take 1 and 2 input channels"),
    "other kinds": (("fine", "resenc"), "The networks have other stages, patch embedding"),
    "no bundle": (("fine", "fine", "--other_bundle", ROOT / "docs"), "is no bundle's folder"),
    "no list": (("fine", "fine", "--datalist", "none.json"), "The data list none.json can't be read"),
    "no section": (("fine", "fine", "--section", "test"), 'has no entries under "test"'),
    "no fold": (("fine", "fine", "--fold", "7"), "has the folds [0, 1], not 7"),
    "a patch of 48": (("fine", "fine", "--patch_size", 48, 48, 48), "--patch_size [48, 48, 48] does not fit"),
    "no crops": (("fine", "fine", "--crops", 0), "--crops is at least 1, got 0"),
    "few samples": (("fine", "fine", "--crops", 1), "at least 4 positions of a stage, got 2; give more --crops"),
    "a misspelt id": (("fine", "fine", "--pixdim", "1"), "--pixdim: neither bundle's inference config has"),
    "axes as published": (
        ("published pre", "pre", "--permuted_axes", "True", "--other_bundle", PRETRAINING),
        "One network permutes the axes of its embedding",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_mistakes_are_told_in_a_sentence(kind, run, tmp_path, capsys):
    arguments, expected = WRONG[kind]
    status, rows = run(*arguments, bundle=PRETRAINING if "published" in arguments[0] else FETA)
    *_, last = capsys.readouterr().err.splitlines()
    assert status == 2 and last.startswith("cka: ") and expected in last
    assert not rows and not any(path.is_file() for path in (tmp_path / "out").glob("*"))


def test_a_broken_scan_is_told_in_a_sentence(run, tmp_path, capsys):
    (tmp_path / "broken.nii.gz").write_bytes(b"no scan")
    (tmp_path / "broken.json").write_text(json.dumps({"validation": [{"image": "broken.nii.gz"}]}))
    status, _ = run("fine", "fine", datalist=tmp_path / "broken.json")
    *_, last = capsys.readouterr().err.splitlines()
    assert status == 2 and last.startswith("cka: ") and "broken.nii.gz can't be read" in last
