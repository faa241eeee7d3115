"""Residual-encoder U-Nets of this project, of nnU-Net and of nnssl: told by their weights, and turned to other axes.

nnU-Net's arrays have the axes z, y, x, or another order that its plan tells (`transpose_forward`); this project's have
x, y, z. A convolution's weights are turned with them, so that a network answers a turned scan with the turned answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from custom.errors import BadInput
from custom.files import read_json
from custom.transfer import tensors_of

STEM = "encoder.stem.convs.0.conv.weight"
READER = "NibabelIOWithReorient"  # nnU-Net's reader that turns a scan to RAS, as the bundles do
ARCHITECTURE = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"


def bare(name: str) -> str:
    """Return a tensor's name without what parallel training and compilation put before it."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", name)


def is_resenc(weights: Mapping[str, torch.Tensor]) -> bool:
    """Return whether weights are, by their names, of a residual-encoder U-Net."""
    return STEM in {bare(name) for name in weights}


def architecture(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of `ResidualEncoderUNet` that some weights tell, with sizes along three axes as lists.

    Raises:
        BadInput: for weights that are not those of a whole 3D network.
    """

    def shapes(pattern: str) -> list[list[int]]:
        found = {int(m[1]): list(value.shape) for n, value in weights.items() if (m := re.fullmatch(pattern, n))}
        return [found[number] for number in sorted(found)]

    first = r"encoder\.stages\.(\d+)\.blocks\.0\.conv1\.conv\.weight"
    stages, up = shapes(first), shapes(r"decoder\.transpconvs\.(\d+)\.weight")[::-1]
    heads = shapes(r"decoder\.seg_layers\.(\d+)\.weight")
    if not stages or len(up) != len(stages) - 1 or len(heads) != len(up) or len(stages[0]) != 5:
        raise BadInput(
            "These weights have no encoder and decoder of a 3D residual-encoder U-Net; name a whole network's."
        )
    blocks = [len(shapes(rf"encoder\.stages\.{n}\.blocks\.(\d+)\.conv1\.conv\.weight")) for n in range(len(stages))]
    convs = [len(shapes(rf"decoder\.stages\.{n}\.convs\.(\d+)\.conv\.weight")) for n in range(len(up))]
    return {
        "input_channels": weights[STEM].shape[1],
        "num_classes": heads[-1][0],
        "n_stages": len(stages),
        "features_per_stage": [shape[0] for shape in stages],
        "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": convs,
        "kernel_sizes": [shape[2:] for shape in stages],
        "strides": [[1, 1, 1], *(shape[2:] for shape in up)],
    }


def network_of(sizes: Mapping[str, Any]) -> nn.Module:
    """Make the network of some sizes, see `architecture`, as the bundles and nnU-Net do.

    Raises:
        BadInput: where its library is not installed.
    """
    try:
        from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
    except ImportError as error:
        raise BadInput(
            "A residual-encoder U-Net needs its library: pip install --no-deps dynamic_network_architectures."
        ) from error
    return ResidualEncoderUNet(
        **sizes,
        conv_op=nn.Conv3d,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def read(weights: Mapping[str, torch.Tensor]) -> tuple[nn.Module, dict[str, str]]:
    """Load weights into the network that they are of.

    Returns:
        the network, and for each name that the weights came with the first of the names of the same tensor.

    Raises:
        BadInput: for weights that lack tensors, have others, or have two values for one tensor.
    """
    named = {bare(name): value for name, value in weights.items()}
    network = network_of(architecture(named))
    own, state = tensors_of(network), network.state_dict(keep_vars=True)
    first = {id(value): name for name, value in own.items()}
    names = {name: first[id(state[bare(name)])] for name in weights if bare(name) in state}
    strange, absent = weights.keys() - names.keys(), own.keys() - set(names.values())
    if strange or absent:
        words = f"has no place for {min(strange)}" if strange else f"needs {min(absent)}, which they lack"
        raise BadInput(
            f"These weights are those of a residual-encoder U-Net of {architecture(named)['n_stages']} stages, but it "
            f"{words}; the file is damaged, or of a variant of that network."
        )
    for name, target in names.items():
        value = weights[name]
        if value.shape != own[target].shape or not torch.equal(value, named.get(target, value)):
            raise BadInput(f"{name} is not the same as {target}, though they are one tensor; the file is damaged.")
        own[target].data.copy_(value)
    return network, names


def turned(network: nn.Module, axes: Sequence[int]) -> nn.Module:
    """Return the network for scans whose axis k is axis `axes[k]` of the scans that a network is for.

    Shapes:
        scan: (B, C, D0, D1, D2) for the network, `scan.permute(0, 1, *(2 + axis for axis in axes))` for that returned.
    """
    order = [0, 1, *(2 + axis for axis in axes)]
    sizes = architecture(network.state_dict())
    for name in ("kernel_sizes", "strides"):
        sizes[name] = [[sides[axis] for axis in axes] for sides in sizes[name]]
    other = network_of(sizes)
    for target, value in zip(other.parameters(), network.parameters(), strict=True):
        target.data = value.data.permute(order).contiguous() if value.ndim == 5 else value.data
    return other


def nnunet_axes(transpose_forward: Sequence[int]) -> list[int]:
    """Return which of the axes x, y, z each axis of nnU-Net's arrays is: they are z, y, x before its plan's turn."""
    return [2 - axis for axis in transpose_forward]


def plan(network: nn.Module, plans: Mapping[str, Any], name: str, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Return nnU-Net's plan of a data set with the configuration "3d_fullres" that fits pre-trained weights.

    Architecture, and where the training's settings tell, patch, spacing and normalisation are those of the weights;
    all else, such as the batch size, stays the data set's own.

    Args:
        network: with nnU-Net's axes.
        plans: of the data set, by one of nnU-Net's planners.
        name: of the new plan.
        trained: settings of the weights' training, see `custom.engine.run_record`.

    Raises:
        BadInput: for a plan by another reader than `READER`, and a patch that the network can't halve so often.
    """
    if plans["image_reader_writer"] != READER:
        raise BadInput(
            f"This plan reads scans by {plans['image_reader_writer']}, which leaves their axes as they are stored; put "
            f'"overwrite_image_reader_writer": "{READER}" into the dataset.json, and plan anew.'
        )
    axes, sizes = nnunet_axes(plans["transpose_forward"]), architecture(network.state_dict())
    own = plans["configurations"]["3d_fullres"]
    config = {**own, "data_identifier": f"{name}_3d_fullres"}
    for id, key in {"patch_size": "patch_size", "pixdim_mm": "spacing"}.items():
        if trained.get(id):
            config[key] = [trained[id][axis] for axis in axes]
    stride = torch.tensor(sizes["strides"]).prod(0).tolist()
    if any(side % step for side, step in zip(config["patch_size"], stride, strict=True)):
        raise BadInput(f"The plan's patch {config['patch_size']} is no multiple of the network's {stride}.")
    window = trained.get("modalities", {}).get("ct", trained.get("intensity", {}))
    properties = dict(plans["foreground_intensity_properties_per_channel"])
    for channel, scheme in enumerate(own["normalization_schemes"]):
        if scheme == "CTNormalization" and "a_min" in window:  # (HU - mean) / std is the bundles' 0 to 1
            low, high = window["a_min"], window["a_max"]
            values = {"mean": low, "std": high - low, "percentile_00_5": low, "percentile_99_5": high}
            properties[str(channel)] = {**properties[str(channel)], **values}
    config["use_mask_for_norm"] = [scheme == "ZScoreNormalization" for scheme in own["normalization_schemes"]]
    arguments = {key: value for key, value in sizes.items() if key not in ("input_channels", "num_classes")}
    config["architecture"] = {
        "network_class_name": ARCHITECTURE,
        "arch_kwargs": {
            **arguments,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    return {
        **plans,
        "plans_name": name,
        "configurations": {"3d_fullres": config},
        "foreground_intensity_properties_per_channel": properties,
    }


def overrides(sizes: Mapping[str, Any]) -> str:
    """Return what a bundle with configs/resenc.json has to override to have the network of some sizes."""
    count, width = sizes["n_stages"], sizes["features_per_stage"][0]
    usual = {
        "features_per_stage": [width * min(2**stage, 10) for stage in range(count)],
        "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
        "n_conv_per_stage_decoder": [1] * (count - 1),
        "kernel_sizes": [[3, 3, 3]] * count,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (count - 1)],
    }
    changed = {f"network_def#{name}": sizes[name] for name, value in usual.items() if sizes[name] != value}
    return f" --feature_size {width}" + "".join(f' --{id} "{value}"' for id, value in changed.items())


def read_plans(file: str | Path) -> dict[str, Any]:
    """Read a plan of nnU-Net.

    Raises:
        BadInput: for a file that is none with a 3D configuration.
    """
    plans = read_json(file)
    needed = {"configurations", "transpose_forward", "image_reader_writer"}
    if not needed <= plans.keys() or "3d_fullres" not in plans["configurations"]:
        raise BadInput(f"{file} is no nnU-Net plan with a 3d_fullres; name one that nnUNetv2_plan_experiment made.")
    return plans
