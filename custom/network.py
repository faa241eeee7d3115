"""Pre-training of a stock network: its embedding is masked, and its deepest features leave beside its output."""

from typing import Any

import torch
from torch import nn

from custom.errors import BadInput
from custom.masking import LocalMasking
from custom.text import did_you_mean


def disruptive_autoencoder(
    network: nn.Module,
    embedding: str = "swinViT.pos_drop",
    features: str = "swinViT",
    masking: LocalMasking | None = None,
    left_out_skip: str | None = None,
) -> nn.Module:
    """Make a network a disruptive autoencoder, in place, by forward hooks on its submodules.

    Its parameters keep their names, so that its weights load into a network without hooks, which in eval mode gives the
    same output. In training mode the network returns its output and the embedding of the loss.

    Args:
        network: any that gives one tensor, such as MONAI's `SwinUNETR`; names are those of its submodules.
        embedding: name of the submodule that gives the embedding (B, C, d, h, w).
        features: name of the submodule that gives the deepest features (B, C', d', h', w'), alone or as the last of
            several.
        masking: of the embedding, in training mode only; None masks nothing.
        left_out_skip: name of a submodule whose output, or the first of several, is replaced by zeros. The last stage
            of a Swin UNETR's decoder sees the input image by way of "encoder1", and with local masking alone the
            network can copy it. The submodule is frozen, unless the features come from it.

    Shapes:
        image: as the network takes it.
        in training mode: what the network gives, and (B, C'), the mean of the deepest features over space.
        in eval mode: what the network gives.

    Raises:
        BadInput: for a name that the network does not have or, when it is called, does not call.

    Randomness:
        see `LocalMasking`; in training mode only.

    Source:
        Valanarasu et al., "Disruptive Autoencoders", MIDL 2024.
    """
    hooks = _Hooks(masking)
    submodule(network, embedding).register_forward_hook(hooks.mask)
    submodule(network, features).register_forward_hook(hooks.keep_features)
    if left_out_skip is not None:
        skip = submodule(network, left_out_skip)
        skip.requires_grad_(left_out_skip == features).register_forward_hook(_leave_out)
    network.register_forward_hook(hooks.add_features)
    return network


def submodule(network: nn.Module, name: str) -> nn.Module:
    """Return the submodule of a network by its name.

    Raises:
        BadInput: for a name that the network does not have.
    """
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        hint = did_you_mean(name, dict(network.named_modules()).keys()) or "; its `named_modules()` have the names."
        raise BadInput(f"{type(network).__name__} has no submodule {name!r}{hint}") from error


class _Hooks:
    """Hooks of one network; those of a copy of the network are copied with it."""

    def __init__(self, masking: LocalMasking | None) -> None:
        self.masking = masking
        self.embedded = False
        self.features: torch.Tensor | None = None

    def mask(self, module: nn.Module, inputs: Any, embedding: torch.Tensor) -> torch.Tensor | None:
        self.embedded = True
        return self.masking(embedding) if self.masking is not None and module.training else None

    def keep_features(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training:
            self.features = output if isinstance(output, torch.Tensor) else output[-1]

    def add_features(self, network: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
        if not network.training:
            return None
        if self.features is None or not self.embedded:
            name = "features" if self.embedded else "embedding"
            raise BadInput(f"{type(network).__name__} does not call the submodule that `{name}` names; name another.")
        features, self.features, self.embedded = self.features, None, False
        return output, features.mean(dim=tuple(range(2, features.ndim)))


def _leave_out(module: nn.Module, inputs: Any, output: Any) -> Any:
    several = isinstance(output, list | tuple)
    return [torch.zeros_like(output[0]), *output[1:]] if several else torch.zeros_like(output)
