"""Residual-encoder U-Nets by tools.weights: to nnU-Net with a plan, back, and what nnU-Net and nnssl write."""

from __future__ import annotations

import json
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from custom.engine.checkpoint import AtomicSaver
from custom.files import write_json
from custom.transfer import tensors_of, transfer
from tests.conftest import autoencoder, segmentation_network
from tests.custom.test_transfer import randomised
from tools import resenc
from tools.weights import main

# Axes that differ in everything, as for thick slices.
UNEVEN = {
    "input_channels": 1,
    "num_classes": 3,
    "n_stages": 3,
    "features_per_stage": [4, 8, 16],
    "n_blocks_per_stage": [1, 2, 1],
    "n_conv_per_stage_decoder": [2, 1],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
}
IMAGE = torch.rand(1, 1, 8, 16, 24, generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "patch_size": [64, 32, 96],
    "pixdim_mm": [1.5, 2, 2.5],
    "modalities": {"ct": {"_target_": "ScaleIntensityRange", "a_min": -1000, "a_max": 1000, "b_min": 0, "b_max": 1}},
}


def plans(turn=(0, 1, 2), reader=resenc.READER, schemes=("CTNormalization",)) -> dict:
    """What nnUNetv2_plan_experiment writes, as far as it matters here (nnU-Net 2.8)."""
    config = {"data_identifier": "nnUNetPlans_3d_fullres", "batch_size": 2, "patch_size": [64, 64, 64]}
    config |= {
        "spacing": [1, 1, 1],
        "normalization_schemes": list(schemes),
        "use_mask_for_norm": [False] * len(schemes),
    }
    return {
        "plans_name": "nnUNetResEncUNetMPlans",
        "image_reader_writer": reader,
        "transpose_forward": list(turn),
        "foreground_intensity_properties_per_channel": {"0": {"mean": 40.0, "std": 7.0, "max": 90.0}},
        "configurations": {"2d": {}, "3d_fullres": config},
    }


def nnunet_checkpoint(network: nn.Module, turn=(0, 1, 2)) -> dict:
    """What nnU-Net's trainer saves: besides the weights NumPy's numbers, and its plan."""
    return {
        "network_weights": OrderedDict(network.state_dict()),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)]},
        "_best_ema": np.float32(0.5),
        "current_epoch": 3,
        "init_args": {"plans": plans(turn), "configuration": "3d_fullres", "fold": 0},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }


def nnssl_checkpoint(network: nn.Module) -> dict:
    """What nnssl publishes (documentation of nnU-Net, nnssl's adaptation plan): nothing is said of a turn."""
    return {
        "network_weights": OrderedDict(network.state_dict()),
        "citations": [],
        "nnssl_adaptation_plan": {
            "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None},
            "pretrain_num_input_channels": 1,
            "key_to_encoder": "encoder.stages",
            "key_to_stem": "encoder.stem",
            "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        },
    }


@pytest.fixture
def run(tmp_path, capsys):
    """Save weights, convert them by the command line, and return what was written and printed."""

    def run(content, *arguments, name="out.pt", plan=None):
        source, out = tmp_path / f"source of {name}", tmp_path / name
        torch.save(content, source)
        if plan is not None:
            write_json(tmp_path / "plans.json", plan)
            arguments = ("--to", "nnunet", "--plans", str(tmp_path / "plans.json"))
        status = main([str(source), str(out), *arguments])
        printed = capsys.readouterr()
        return (torch.load(out, weights_only=True), printed.out) if status == 0 else (None, printed.err)

    return run


@pytest.mark.parametrize("axes", [[2, 1, 0], [0, 2, 1], [1, 2, 0]], ids=str)
def test_a_turned_network_answers_a_turned_scan_with_the_turned_answer(axes):
    network, order = randomised(resenc.network_of(UNEVEN)).eval(), [0, 1, *(2 + axis for axis in axes)]
    with torch.no_grad():
        expected, turned = network(IMAGE), resenc.turned(network, axes).eval()(IMAGE.permute(order))
    torch.testing.assert_close(turned, expected.permute(order), atol=1e-4 * expected.abs().max().item(), rtol=1e-4)


def test_weights_tell_the_sizes_of_their_network():
    assert resenc.architecture(resenc.network_of(UNEVEN).state_dict()) == UNEVEN


@pytest.mark.parametrize("turn", [(0, 1, 2), (1, 0, 2), (2, 0, 1)], ids=str)
def test_to_nnunet_and_back_nothing_is_lost_and_every_name_is_reported(turn, run):
    own = randomised(autoencoder(backbone="resenc"))
    there, report = run(own.state_dict(), plan=plans(turn))
    assert there.keys() == {"network_weights"}
    # nnU-Net's arrays are z, y, x, then turned by its plan: the network there is the one here, turned.
    order = [0, 1, *(2 + (2 - axis) for axis in turn)]
    network = segmentation_network("resenc", classes=1).eval()
    network.load_state_dict(there["network_weights"])
    image = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        expected, found = own.eval()(image).permute(order), network(image.permute(order))
    assert (found - expected).norm() < 1e-3 * expected.norm()
    for name in own.state_dict():
        assert re.search(rf"(?<!\S){re.escape(name)}(?: ->|\n)", report), name
    assert f"{len(tensors_of(own))} tensors under {len(own.state_dict())} names." in report
    back, _ = run({**nnunet_checkpoint(network, turn)}, name="back.pt")
    assert all(torch.equal(value, back["model"][name]) for name, value in own.state_dict().items())


def test_the_plan_fits_the_weights_and_leaves_the_rest(tmp_path, capsys):
    state = autoencoder(backbone="resenc").state_dict()
    write_json(tmp_path / "run.json", [{"settings": SETTINGS, "overrides": {}}])
    AtomicSaver(tmp_path / "models", tmp_path)(state, "model.pt")
    before = plans((1, 0, 2), schemes=("CTNormalization", "ZScoreNormalization"))
    before["foreground_intensity_properties_per_channel"]["1"] = {"mean": 3.0}
    write_json(tmp_path / "nnUNetPlans.json", before)
    arguments = ["--to", "nnunet", "--plans", str(tmp_path / "nnUNetPlans.json")]
    assert main([str(tmp_path / "models/model.pt"), str(tmp_path / "dae.pth"), *arguments]) == 0
    assert "-plans_name dae" in (printed := capsys.readouterr().out) and "-p dae -pretrained_weights" in printed
    plan = json.loads((tmp_path / "dae.json").read_text())
    config = plan["configurations"].pop("3d_fullres")
    # Ours are x, y, z; theirs z, y, x, of which the plan takes the second first.
    assert config["patch_size"] == [32, 96, 64] and config["spacing"] == [2, 2.5, 1.5]
    assert config["data_identifier"] == "dae_3d_fullres" and config["batch_size"] == 2
    assert config["use_mask_for_norm"] == [False, True] and not plan["configurations"]
    properties = plan["foreground_intensity_properties_per_channel"]
    hu = properties["0"]  # (clipped HU - mean) / std, as nnU-Net's CTNormalization does
    assert [(value - hu["mean"]) / hu["std"] for value in (-1000, 0, 1000)] == [0, 0.5, 1]
    assert (hu["percentile_00_5"], hu["percentile_99_5"], hu["max"]) == (-1000, 1000, 90)
    assert properties["1"] == {"mean": 3.0} and plan["plans_name"] == "dae"
    arguments = config["architecture"]["arch_kwargs"]
    assert arguments["features_per_stage"] == [4, 8, 16, 32, 40, 40] and arguments["n_blocks_per_stage"] == [1] * 6
    assert "input_channels" not in arguments and "num_classes" not in arguments


@pytest.mark.parametrize("made", [nnunet_checkpoint, nnssl_checkpoint])
def test_checkpoints_of_others_start_a_segmentation_network(made, run, tmp_path):
    source = randomised(segmentation_network("resenc", classes=4))
    converted, report = run(made(source))
    assert "Left out, as no weights: " in report and "--feature_size 4 --" in report
    assert '--network_def#n_blocks_per_stage "[1, 1, 1, 1, 1, 1]"' in report and "features_per_stage" not in report
    network = segmentation_network("resenc", classes=3)
    left = transfer(network, tmp_path / "out.pt")
    assert left and set(left.values()) == {"the output layer is new"}
    turned = resenc.turned(source, [2, 1, 0]).state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, converted["model"][name]) is (".seg_layers." not in name)
        assert torch.equal(turned[name], converted["model"][name])


def changed(name: str, value: torch.Tensor | None) -> dict:
    weights = resenc.network_of(UNEVEN).state_dict() | {name: value}
    return {"network_weights": {name: value for name, value in weights.items() if value is not None}}


STEM = "encoder.stem.convs.0.conv.weight"
WRONG = {
    "a name that is not there": (changed("encoder.gate.weight", torch.ones(1)), None, "has no place for encoder.gate"),
    "a tensor left out": (changed("decoder.transpconvs.0.bias", None), None, "needs decoder.transpconvs.0.bias, which"),
    "two values for one": (
        changed("decoder.encoder.stem.convs.0.conv.bias", torch.ones(4)),
        None,
        "is not the same as",
    ),
    "no decoder": (
        {"model": {STEM: torch.ones(4, 1, 3, 3, 3)}},
        None,
        "no encoder and decoder of a 3D residual-encoder U-Net",
    ),
    "another reader": (changed("a", None), plans(reader="SimpleITKIO"), '"overwrite_image_reader_writer": "Nibabel'),
    "no 3D plan": (changed("a", None), {"configurations": {"2d": {}}}, "is no nnU-Net plan with a 3d_fullres"),
    "a Swin UNETR": (lambda: autoencoder().state_dict(), plans(), "is of no residual-encoder U-Net"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_weights_and_plans_are_refused_in_a_sentence(kind, run, tmp_path):
    content, plan, expected = WRONG[kind]
    written, error = run(content() if callable(content) else content, plan=plan)
    assert written is None and expected in error and error.startswith("weights: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_patch_that_the_network_can_not_halve_is_refused(run):
    plan = plans()
    plan["configurations"]["3d_fullres"]["patch_size"] = [40, 56, 40]
    written, error = run(autoencoder(backbone="resenc").state_dict(), plan=plan)
    assert written is None and "patch [40, 56, 40] is no multiple of the network's [32, 32, 32]" in error


def test_weights_without_a_plan_are_refused(run):
    assert "for --to nnunet with its --plans" in run(autoencoder(backbone="resenc").state_dict(), "--to", "nnunet")[1]
