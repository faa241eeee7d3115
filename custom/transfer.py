"""Start a segmentation network from the weights of a pre-training."""

import logging
from pathlib import Path

from monai.networks.utils import copy_model_state
from torch import nn

from custom.engine.checkpoint import read_weights
from custom.errors import BadInput

logger = logging.getLogger(__name__)

PARTS = {"encoder": ("swinViT.", "encoder"), "decoder": ("decoder",), "both": ("swinViT.", "encoder", "decoder")}


def transfer(
    network: nn.Module, checkpoint: str | Path | None, parts: str = "both", least_share: float = 0.5
) -> dict[str, str]:
    """Copy the weights of a pre-training into a network, by name, and report what came over in the log.

    The encoder is the Swin transformer with the blocks `encoder1` to `encoder10` that lead out of it, the decoder the
    blocks `decoder1` to `decoder5`. The output layer is always new. Where the network has another number of input
    channels than the checkpoint, each channel's weights in its first layers are the sum of the checkpoint's over its
    channels, divided by the network's number of channels: they give what they gave for the mean of the channels.

    Args:
        network: a `SwinUNETR`, changed in place.
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
    weights, own = read_weights(checkpoint), network.state_dict()
    wanted = {name: value for name, value in weights.items() if name in own and name.startswith(PARTS[parts])}
    for name, value in wanted.items():
        if value.ndim == own[name].ndim == 5:  # convolutions, (to, from, ...)
            channels = own[name].shape[1]
            if value.shape[1] != channels and value[:, 0].shape == own[name][:, 0].shape:
                wanted[name] = value.sum(1, keepdim=True).expand(-1, channels, -1, -1, -1) / channels
    misfits = [name for name, value in wanted.items() if value.shape != own[name].shape]
    if misfits:
        found, needed = (tuple(state[misfits[0]].shape) for state in (weights, own))
        raise BadInput(
            f"The checkpoint {checkpoint} is of a network of another size: {misfits[0]} is {found} there and {needed} "
            f"here ({len(misfits)} tensors differ); give the --feature_size that it was trained with."
        )
    if not wanted:
        raise BadInput(
            f"Nothing in the checkpoint {checkpoint} fits the network's {parts}: it has {len(weights)} tensors, such "
            f"as {', '.join(list(weights)[:3])}; name the model.pt of a pre-training."
        )
    asked = [name for name in own if name.startswith(PARTS[parts])]
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
        if name.startswith("out.")
        else "not in the checkpoint"
        if name not in weights
        else f"--transfer {parts}"
        for name in own.keys() - wanted.keys()
    }
    logger.info(f"{len(wanted)} of {len(own)} tensors start from {checkpoint} (--transfer {parts}).")
    for reason in sorted(set(left.values())):
        names = sorted(name for name in left if left[name] == reason)
        logger.info(f"{len(names)} start anew, {reason}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    unused = sorted(weights.keys() - own.keys())
    if unused:
        logger.info(f"{len(unused)} of the checkpoint have no place in the network: {', '.join(unused[:4])}")
    return left
