"""Local masking: channels of the token embedding are set to zero, not tokens (paper, section 3.1)."""

import torch
from torch import nn


class LocalMasking(nn.Module):
    """Mask `round(ratio * C)` of the C channels of an embedding, chosen anew for every sample and every call.

    Every token keeps its place and loses a part of what it says, so that the network has to restore local detail from
    the channels that are left. In eval mode nothing is masked. The module has no parameters.

    Args:
        ratio: share of the channels to mask, in [0, 1].
        fill: "zeros", or "noise" for standard normal noise (the paper's ablation).

    Shapes:
        input and output: (B, C, D, H, W), or any (B, C, ...).

    Raises:
        ValueError: for a ratio outside [0, 1] or an unknown fill.

    Randomness:
        torch's generator of the embedding's device.

    Source:
        Valanarasu et al., "Disruptive Autoencoders", MIDL 2024, local masking. The published code draws one set of
        channels for the whole batch and, at feature size 48 and patch 96, zeroes slabs of space instead.
    """

    def __init__(self, ratio: float, fill: str = "zeros") -> None:
        super().__init__()
        if not 0 <= ratio <= 1:
            raise ValueError(f"the ratio of local masking must lie in [0, 1], got {ratio}")
        if fill not in ("zeros", "noise"):
            raise ValueError(f'local masking fills with "zeros" or "noise", got "{fill}"')
        self.ratio = ratio
        self.fill = fill

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return embedding
        batch, channels = embedding.shape[:2]
        # The ranks of random numbers are a random permutation: exactly the same number of channels in every sample.
        rank = torch.rand(batch, channels, device=embedding.device).argsort(1).argsort(1)
        masked = (rank < round(self.ratio * channels)).view(batch, channels, *[1] * (embedding.ndim - 2))
        filling = torch.randn_like(embedding) if self.fill == "noise" else torch.zeros_like(embedding)
        return torch.where(masked, filling, embedding)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, fill={self.fill}"
