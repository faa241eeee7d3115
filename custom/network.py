"""Pre-training of a stock network: its token embedding is masked, and its deepest features leave beside its output."""

from typing import Any

import torch
from torch import nn

from custom.masking import LocalMasking


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
        network: such as MONAI's `SwinUNETR`.
        embedding: name of the submodule that gives the token embedding (B, C, d, h, w).
        features: name of the submodule that gives the deepest features (B, C', d', h', w'), alone or as the last of
            several.
        masking: of the embedding, in training mode only; None masks nothing.
        left_out_skip: name of a submodule whose output is replaced by zeros, and which is frozen. The last stage of a
            Swin UNETR's decoder sees the input image by way of "encoder1", and with local masking alone the network can
            copy it.

    Shapes:
        image: as the network takes it.
        in training mode: what the network gives, and (B, C'), the mean of the deepest features over space.
        in eval mode: what the network gives.

    Raises:
        AttributeError: for a name that the network does not have.

    Randomness:
        see `LocalMasking`; in training mode only.

    Source:
        Valanarasu et al., "Disruptive Autoencoders", MIDL 2024.
    """
    hooks = _Hooks(masking)
    network.get_submodule(embedding).register_forward_hook(hooks.mask)
    network.get_submodule(features).register_forward_hook(hooks.keep_features)
    if left_out_skip is not None:
        network.get_submodule(left_out_skip).requires_grad_(False).register_forward_hook(_zeros)
    network.register_forward_hook(hooks.add_features)
    return network


class _Hooks:
    """Hooks of one network; those of a copy of the network are copied with it."""

    def __init__(self, masking: LocalMasking | None) -> None:
        self.masking = masking
        self.features: torch.Tensor | None = None

    def mask(self, module: nn.Module, inputs: Any, embedding: torch.Tensor) -> torch.Tensor | None:
        return self.masking(embedding) if self.masking is not None and module.training else None

    def keep_features(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training:
            self.features = output if isinstance(output, torch.Tensor) else output[-1]

    def add_features(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
        features, self.features = self.features, None
        return None if features is None else (output, features.mean(dim=tuple(range(2, features.ndim))))


def _zeros(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)
