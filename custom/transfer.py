"""Start a segmentation network from the weights of a pre-training."""

import json
import logging
import re
from pathlib import Path

import torch
from monai.networks.utils import copy_model_state
from torch import nn

from custom.engine.checkpoint import read_weights, training_of, weights_file
from custom.engine.config_check import running_workflow
from custom.errors import BadInput

logger = logging.getLogger(__name__)

PARTS = {"encoder": ("encoder",), "decoder": ("decoder",), "both": ("encoder", "decoder")}
# What the names of the tensors of a part match, the output layer first: of MONAI's `SwinUNETR` and of the library of
# nnU-Net, whose decoder also holds the encoder, with other names of the same tensors.
NAMES = {
    "output": re.compile(r"out\.|decoder\.seg_layers\."),
    "encoder": re.compile(r"swinViT\.|encoder"),
    "decoder": re.compile(r"decoder"),
}


def transfer(
    network: nn.Module, checkpoint: str | Path | None, parts: str = "both", least_share: float = 0.5
) -> dict[str, str]:
    """Copy the weights of a pre-training into a network, by name, and report what came over in the log.

    The encoder is the Swin transformer with the blocks `encoder1` to `encoder10` that lead out of it, the decoder the
    blocks `decoder1` to `decoder5`; other networks name them `encoder` and `decoder`. The output layer is always new.
    Where the network has another number of input channels than the checkpoint, each channel's weights in its first
    layers are the sum of the checkpoint's over its channels, divided by the network's number of channels: they give
    what they gave for the mean of the channels.

    Args:
        network: a `SwinUNETR` or another whose tensors `NAMES` knows, changed in place.
        checkpoint: file of the pre-training's weights, None to start from scratch.
        parts: "encoder", "decoder" or "both".
        least_share: of the tensors of these parts, in [0, 1], which have to come from the checkpoint.

    Returns:
        name of each of the network's tensors that stays as it is, and why.

    Raises:
        BadInput: for a checkpoint that can't be read, of which nothing or too little fits, or of a network of another
            size.
    """
    if parts not in PARTS:
        raise BadInput(f"--transfer is one of {list(PARTS)}, got {parts!r}.")
    if checkpoint is None:
        logger.info("No --pretrained checkpoint: the network starts from scratch.")
        return {}
    weights, own = read_weights(checkpoint), tensors_of(network)
    asked = [name for name in own if part_of(name) in PARTS[parts]]
    wanted = {name: weights[name] for name in asked if name in weights}
    for name, value in wanted.items():
        if value.ndim == own[name].ndim == 5:  # convolutions, (to, from, ...)
            channels = own[name].shape[1]
            if value.shape[1] != channels and value[:, 0].shape == own[name][:, 0].shape:
                wanted[name] = value.sum(1, keepdim=True).expand(-1, channels, -1, -1, -1) / channels
    differences = training_differences(checkpoint)
    misfits = [name for name, value in wanted.items() if value.shape != own[name].shape]
    if misfits:
        found, needed = (tuple(state[misfits[0]].shape) for state in (weights, own))
        raise BadInput(
            f"The checkpoint {checkpoint} is of a network of another size: {misfits[0]} is {found} there and {needed} "
            f"here ({len(misfits)} tensors differ); give the --feature_size that it was trained with."
            + "".join(f" It was trained with {difference}." for difference in differences)
        )
    for difference in differences:
        logger.warning(f"The checkpoint {checkpoint} was trained with {difference}.")
    if not wanted:
        raise BadInput(
            f"Nothing in the checkpoint {checkpoint} fits the network's {parts}: it has {len(weights)} tensors, such "
            f"as {', '.join(list(weights)[:3])}; name the model.pt of a pre-training."
        )
    came = f"{len(wanted)} of the {len(asked)} tensors of --transfer {parts}, {len(wanted) / len(asked):.0%}"
    if len(wanted) < least_share * len(asked):
        raise BadInput(
            f"The checkpoint {checkpoint} has {came}; name the model.pt of a pre-training, a part that it has with "
            f"--transfer, or allow so few with --least_transferred."
        )
    if len(wanted) < len(asked):
        logger.warning(f"The checkpoint {checkpoint} has {came}; the others start anew.")
    copy_model_state(network, wanted)
    left = {
        name: "the output layer is new"
        if part_of(name) == "output"
        else "not in the checkpoint"
        if name not in weights
        else f"--transfer {parts}"
        for name in own.keys() - wanted.keys()
    }
    logger.info(f"{len(wanted)} of {len(own)} tensors start from {checkpoint} (--transfer {parts}).")
    for reason in sorted(set(left.values())):
        names = sorted(name for name in left if left[name] == reason)
        logger.info(f"{len(names)} start anew, {reason}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    unused = sorted(weights.keys() - network.state_dict().keys())
    if unused:
        logger.info(f"{len(unused)} of the checkpoint have no place in the network: {', '.join(unused[:4])}")
    return left


def tensors_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a network's state by name, each once: under the first of the names that it has there."""
    own, seen = {}, set()
    for name, value in network.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            own[name] = value
        seen.add(id(value))
    return own


def part_of(name: str) -> str | None:
    """Return of which part a network's tensor is, by its name: "encoder", "decoder", "output" or none of them."""
    return next((part for part, names in NAMES.items() if names.match(name)), None)


def training_differences(checkpoint: str | Path) -> list[str]:
    """Say in which sizes the training of weights, where it is known, and the config that is run differ."""
    workflow = running_workflow()
    trained = (training_of(weights_file(checkpoint)) or {}).get("settings") or {}
    config = {} if workflow is None else workflow.parser.config
    names = [name for name in ("feature_size", "pixdim_mm", "patch_size") if name in trained and name in config]
    return [
        f"{name} {json.dumps(trained[name])}, and here it is {json.dumps(config[name])}"
        for name in names
        if trained[name] != json.loads(json.dumps(config[name], default=str))
    ]
