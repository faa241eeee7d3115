"""The authors' published networks: MONAI's Swin UNETR with what theirs does otherwise, each a switch."""

import torch
from monai.networks.blocks import UnetBasicBlock
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import PatchMerging
from torch import nn

from custom.errors import BadInput
from custom.masking import LocalMasking

# Places in a cube of eight tokens, by first, second and third axis; 010 and 001 come twice, 110 and 011 never.
OCTANTS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))


class RepeatedOctantMerging(PatchMerging):
    """Patch merging that takes two of eight tokens twice and two never, as published and in MONAI up to 1.4.

    Shapes:
        tokens: (B, D, H, W, C), D, H and W even.
        merged: (B, D / 2, H / 2, W / 2, 2 * C).
    """

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.reduction(self.norm(torch.cat([tokens[:, d::2, h::2, w::2] for d, h, w in OCTANTS], -1)))


class AxisPermutation(nn.Module):
    """Let the first spatial axis take the place of the channels: what the published reshape of the tokens amounts to.

    The published code flattens an embedding (B, C, D, H, W) to tokens (B, D * H * W, C) and views them as
    (B, C, D, H, W) without turning them back, which works for C = D = H = W only.

    Shapes:
        embedding: (B, C, D, H, W), C = D = H = W; output: the same, with the axes (B, D, H, W, C).

    Raises:
        BadInput: for another token grid.
    """

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        channels, *grid = embedding.shape[1:]
        if grid != [channels] * 3:
            raise BadInput(
                f"`permuted_axes` takes patches with twice as many voxels a side as the feature size, {channels}, but "
                f"this one has {[2 * side for side in grid]}; give --patch_size {[2 * channels] * 3} or, for weights "
                f"that were not trained with it, --permuted_axes False."
            )
        return embedding.permute(0, 2, 3, 4, 1)


class SharedLocalMasking(LocalMasking):
    """Local masking as published: one set of channels for the whole batch, and their number rounded down.

    Noise does not replace the masked channels but multiplies them.

    Args, Shapes, Raises, Randomness:
        see `LocalMasking`.
    """

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return embedding
        channels = embedding.shape[1]
        masked = torch.randperm(channels, device=embedding.device)[: int(self.ratio * channels)]
        factor = torch.ones_like(embedding)
        # The variance is that of the published disruption by noise.
        factor[:, masked] = 0.1**0.5 * torch.randn_like(factor[:, masked]) if self.fill == "noise" else 0
        return embedding * factor


class PublishedSwinUNETR(SwinUNETR):
    """MONAI's `SwinUNETR`, with what the published networks do otherwise where it is switched on.

    The published pre-training network has all of it, and leaves hidden states as they are (`normalize=False`, an
    argument of MONAI's); the published fine-tuning network has the embedding and the merging.

    Args:
        block_embedding: the patch embedding is a block of two 3x3x3 convolutions with instance norm, the first of
            stride 2, instead of one strided convolution.
        repeated_octants: see `RepeatedOctantMerging`; also for weights trained with MONAI up to 1.4.
        permuted_axes: see `AxisPermutation`; for the published pre-training weights (feature size 48, patch 96).
        args, kwargs: see `SwinUNETR`.

    Shapes:
        as `SwinUNETR`.

    Raises:
        BadInput: see `AxisPermutation`.

    Source:
        https://github.com/Project-MONAI/research-contributions, folder DAE.
    """

    def __init__(
        self,
        *args,
        block_embedding: bool = False,
        repeated_octants: bool = False,
        permuted_axes: bool = False,
        **kwargs,
    ) -> None:
        if repeated_octants:
            kwargs["downsample"] = RepeatedOctantMerging
        super().__init__(*args, **kwargs)
        embedding = self.swinViT.patch_embed
        if block_embedding:
            channels = embedding.proj.in_channels, embedding.proj.out_channels
            norm = ("INSTANCE", {"affine": True})
            embedding.proj = UnetBasicBlock(3, *channels, kernel_size=3, stride=2, norm_name=norm)
        if permuted_axes:
            # The embedding passes through the parameterless pos_drop before anything reads it.
            self.swinViT.pos_drop = nn.Sequential(self.swinViT.pos_drop, AxisPermutation())
