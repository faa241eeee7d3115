"""Tests of tools.weights: what is recognised, what comes over, what leads back, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import filter_swinunetr

from custom.published import PublishedSwinUNETR
from custom.transfer import transfer
from tests.conftest import ROOT, autoencoder
from tests.custom.test_published import fill, manifest
from tests.custom.test_transfer import Code
from tools.weights import main

HEADS = ("norm.weight", "norm.bias", "rotation_head.weight", "contrastive_head.bias", "conv.0.weight")
PRETRAINING, FINETUNING = (fill(manifest(network), 5) for network in ("pretrain_fs12", "finetune_fs12"))
INDEX = SwinUNETR(in_channels=1, out_channels=1, feature_size=12).swinViT.layers1[0].blocks[0].attn


def randomised(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a network, each other than an initial one."""
    return {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }


def self_supervised() -> dict[str, torch.Tensor]:
    """Weights named as in the published encoder of the Swin-UNETR self-supervision."""
    state = randomised(SwinUNETR(in_channels=1, out_channels=1, feature_size=12))
    encoder = {name.removeprefix("swinViT."): value for name, value in state.items() if name.startswith("swinViT.")}
    named = {"module." + name.replace("mlp.linear", "mlp.fc"): value for name, value in encoder.items()}
    return named | {f"module.{name}": torch.randn(5) for name in HEADS}


def with_indices(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Weights with the buffers that a state dict has beside its parameters."""
    index = INDEX.relative_position_index
    return weights | {name.format(layer, block): index for layer in (1, 2, 3, 4) for block in (0, 1)}


SOURCES = {
    "pre-training": lambda: {"model": PRETRAINING},
    "pre-training with buffers": lambda: {
        "model": with_indices(PRETRAINING, "encoder.layers{}.0.0.blocks.{}.attn.relative_position_index"),
        "epoch": 3,
    },
    "fine-tuning": lambda: {"state_dict": FINETUNING, "best_acc": 0.8},
    "fine-tuning, bare and parallel": lambda: {f"module.{name}": value for name, value in FINETUNING.items()},
    "self-supervision": lambda: {"state_dict": self_supervised()},
    "own": lambda: randomised(autoencoder(window_size=7)),
    "own segmentation": lambda: randomised(SwinUNETR(in_channels=4, out_channels=5, feature_size=12)),
}


@pytest.fixture
def run(tmp_path, capsys):
    """Save weights, convert them by the command line, and return what was written and printed."""

    def run(content, *arguments, name="out.pt"):
        source, out = tmp_path / f"source of {name}", tmp_path / name
        torch.save(content, source)
        assert main([str(source), str(out), *arguments]) == 0
        return torch.load(out, weights_only=True), capsys.readouterr().out

    return run


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def weights_of(content: dict) -> dict[str, torch.Tensor]:
    return content.get("model", content.get("state_dict", content))


@pytest.mark.parametrize("kind", SOURCES)
def test_nothing_is_lost_on_the_way_there_and_back(kind, run):
    source = SOURCES[kind]()
    ours, _ = run(source)
    stock, _ = run(ours, "--to", "stock")
    for converted in (ours, stock):
        back, _ = run(converted, "--to", "published")
        assert same(weights_of(back), weights_of(source)) and back.keys() == source.keys() - {"epoch", "best_acc"}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_tensor_is_reported(kind, run):
    source = SOURCES[kind]()
    converted, report = run(source)
    for name in converted["model"].keys() | weights_of(source).keys():
        assert len(re.findall(rf"(?<!\S){re.escape(name)}(?=:? |\n)", report)) == 1, name
    assert all(": " in line for line in report.splitlines() if line.startswith(("unused", "missing", "computed")))
    assert ("Left out, as no weights: " in report) is bool({"epoch", "best_acc"} & source.keys())


@pytest.mark.parametrize(
    "kind, recognised",
    [
        (
            "pre-training",
            "the published pre-training, with the published patch embedding, feature size 12, 1 input and 1",
        ),
        (
            "fine-tuning",
            "the published fine-tuning, with the published patch embedding, feature size 12, 1 input and 14",
        ),
        ("self-supervision", "the encoder of the Swin-UNETR self-supervision, with the stock patch embedding, feature"),
        ("own segmentation", "a Swin UNETR, with the stock patch embedding, feature size 12, 4 input and 5 output"),
    ],
)
def test_it_says_what_it_recognised(kind, recognised, run):
    assert run(SOURCES[kind]())[1].startswith(f"Recognised: {recognised}")


def test_published_names_are_mapped_as_monai_maps_them(run):
    """MONAI's filter for the published pre-training leaves the names of the MLPs and the dead tensors as they are."""
    converted, _ = run({"model": PRETRAINING})
    pairs = dict(filter(None, (filter_swinunetr(name, value) for name, value in PRETRAINING.items())))
    assert len(pairs) > 100
    for name, value in pairs.items():
        assert torch.equal(converted["model"][name.replace("mlp.fc", "mlp.linear")], value)


def test_the_self_supervised_encoder_comes_over_as_monai_loads_it(run):
    weights = self_supervised()
    converted, report = run({"state_dict": weights})
    network = SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
    network.load_from({"state_dict": weights})
    encoder = {name: value for name, value in network.state_dict().items() if name.startswith("swinViT.")}
    assert same(converted["model"], encoder)
    assert len(re.findall("^missing .*not in an encoder alone, starts anew$", report, re.M)) == len(
        network.state_dict()
    ) - len(encoder)


def test_the_file_is_a_pre_training_for_a_segmentation_network(run, tmp_path):
    for kind, block in (("pre-training", True), ("self-supervision", False)):
        converted, _ = run(SOURCES[kind](), name=f"{kind}.pt")
        network = PublishedSwinUNETR(in_channels=1, out_channels=5, feature_size=12, block_embedding=block)
        left = transfer(network, tmp_path / f"{kind}.pt")
        assert set(left) == network.state_dict().keys() - converted["model"].keys() | {
            "out.conv.conv.weight",
            "out.conv.conv.bias",
        }


def test_own_weights_load_into_a_stock_network(run):
    own = randomised(autoencoder(window_size=7))
    converted, report = run(own, "--to", "stock")
    network = SwinUNETR(in_channels=1, out_channels=1, feature_size=12)
    network.load_state_dict(converted["model"])
    assert same(network.state_dict(), own) and "Note" not in report
    assert "SwinUNETR(in_channels=1, out_channels=1, feature_size=12)" in report and "strict" not in report


def test_what_a_stock_network_does_otherwise_is_said(run):
    _, report = run({"model": PRETRAINING}, "--to", "stock")
    assert "Note: these were trained with another patch merging" in report and "strict=False" in report
    assert re.search(
        r"^missing .*swinViT.patch_embed.proj.weight: of another patch embedding, starts anew$", report, re.M
    )


@pytest.mark.parametrize("network, classes", [("pretrain_fs12", 1), ("finetune_fs12", 14)])
def test_own_weights_get_the_names_and_shapes_of_published_ones(network, classes, run):
    own = randomised(PublishedSwinUNETR(in_channels=1, out_channels=classes, feature_size=12, block_embedding=True))
    published, report = run(own, "--to", "published")
    (key, weights), *_ = published.items()
    assert key == ("model" if classes == 1 else "state_dict")
    shapes = {name: list(value.shape) for name, value in weights.items() if not name.endswith("position_index")}
    assert shapes == manifest(network)
    assert report.count("influences nothing, is asked for") == (7 if classes == 1 else 4)
    assert same(run(published)[0]["model"], own)


def test_the_next_command_names_files_that_exist(run):
    for kind in ("pre-training", "fine-tuning", "self-supervision", "own"):
        _, report = run(SOURCES[kind]())
        files = re.findall(r"bundles/\w+/configs/\w+\.json", report)
        assert files and all((ROOT / file).is_file() for file in files)
        assert any("published.json" in file for file in files) is (kind != "own")
        assert ("--network_def#block_embedding False" in report) is (kind == "self-supervision")


def changed(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The published pre-training with one tensor changed, added or, for None, left out."""
    weights = PRETRAINING | {name: value}
    return {name: value for name, value in weights.items() if value is not None}


OUT = "out.conv.conv.weight"
WRONG = {
    "no weights": ({"epoch": 3}, (), "holds no network's weights"),
    "another network": (
        torch.nn.Linear(2, 2).state_dict(),
        (),
        "not the weights of a 3D Swin UNETR, but tensors such as",
    ),
    "another feature size": ({"model": PRETRAINING}, ("--feature_size", "48"), "has the feature size 12, not 48."),
    "two feature sizes": (
        changed(OUT, torch.ones(1, 24, 1, 1, 1)),
        (),
        f"{OUT} of shape (1, 24, 1, 1, 1) is not that of",
    ),
    "no Swin UNETR's size": (
        changed("encoder.patch_embed.proj.conv1.conv.weight", torch.ones(10, 1, 3, 3, 3)),
        (),
        "not the weights of a 3D Swin UNETR",
    ),
    "a tensor left out": (changed(OUT, None), (), f"lack 1 tensors, such as {OUT}"),
    "a tensor too many": (
        changed("encoder5.weight", torch.ones(1)),
        (),
        "encoder5.weight has no place in a Swin UNETR",
    ),
    "other windows": (
        changed("encoder.layers1.0.0.blocks.0.attn.relative_position_index", torch.zeros(343, 343)),
        (),
        "relative_position_index of shape (343, 343) is not that of",
    ),
    "one place for two": (changed("module.out.conv.conv.bias", torch.ones(1)), (), "have the same place"),
    "a damaged origin": ({"model": PRETRAINING, "origin": {"names": {}}}, (), 'The "origin" in'),
    "the stock embedding": (
        SwinUNETR(in_channels=1, out_channels=1, feature_size=12).state_dict(),
        ("--to", "published"),
        "have MONAI's patch embedding or no decoder",
    ),
}


def refused(arguments: list, expected: str, capsys) -> None:
    """Check that a call ends with one sentence and writes nothing."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and printed.err.startswith("weights: ") and printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_weights_are_refused_in_a_sentence(kind, tmp_path, capsys):
    content, arguments, expected = WRONG[kind]
    torch.save(content, tmp_path / "source.pt")
    refused([tmp_path / "source.pt", tmp_path / "out.pt", *arguments], expected, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["source.pt"]


def test_damaged_files_and_code_are_refused_in_a_sentence(tmp_path, capsys):
    torch.save({"model": PRETRAINING}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-100_000])
    torch.save({"model": Code(tmp_path / "written by unpickling")}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("weights")
    for name, expected in {
        "cut.pt": "it is damaged or no PyTorch checkpoint",
        "code.pt": "it is damaged or no PyTorch checkpoint",
        "text.pt": "it is damaged or no PyTorch checkpoint",
        "no.pt": "There is no checkpoint",
    }.items():
        refused([tmp_path / name, tmp_path / "out.pt"], expected, capsys)
    for out in (tmp_path, tmp_path / "no folder" / "out.pt", tmp_path / "whole.pt"):
        refused([tmp_path / "whole.pt", out], "must be another file than", capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.pt", "cut.pt", "code.pt", "text.pt"}
