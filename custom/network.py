"""The pre-training network: MONAI's Swin UNETR with local masking, and its costliest blocks made quicker."""

import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetrUpBlock
from torch import nn

from custom.masking import LocalMasking
from custom.published import SharedLocalMasking, SwinUNETRVariant


class InstanceNorm(nn.InstanceNorm3d):
    """Instance norm by torch's kernel for groups of one channel, which takes a third of the time, on a GPU two thirds.

    Under autocast the values stay in half precision, as those of instance norm do; the kernel adds up in float32.

    Shapes:
        input and output: (B, C, D, H, W).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, x.shape[1], eps=self.eps)


class FoldedUpBlock(UnetrUpBlock):
    """MONAI's decoder stage, without the upsampled features and their concatenation with the skip.

    Nothing nonlinear stands between the upsampling (a transposed convolution of stride 2) and the convolution of its
    result, so that both are one transposed convolution, whose kernel is the one convolved with the other: 8 instead of
    28 products for each output voxel and pair of channels.

    Shapes:
        x: (B, C_in, D, H, W); skip and output: (B, C, 2 * D, 2 * H, 2 * W).
    """

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        block = self.conv_block
        output = block.lrelu(block.norm1(self._convolve(x, skip, block.conv1.conv.weight)))
        output = block.norm2(block.conv2(output))
        output += block.norm3(self._convolve(x, skip, block.conv3.conv.weight))
        return block.lrelu(output)

    def _convolve(self, x: torch.Tensor, skip: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Convolve the concatenation of upsampled x and skip with a weight (C, 2 * C, k, k, k), k odd."""
        upsampled, beside = weight.chunk(2, 1)
        pad = weight.shape[-1] // 2
        kernel = F.conv3d(self.transp_conv.conv.weight, upsampled, padding=2 * pad)
        return F.conv_transpose3d(x, kernel, stride=2, padding=pad) + F.conv3d(skip, beside, padding=pad)


class DisruptiveAutoencoder(SwinUNETRVariant):
    """MONAI's `SwinUNETR` whose token embedding is locally masked during training.

    It has the parameters of `SwinUNETR` under the same names, so that its weights load into a stock one, and in eval
    mode it gives the same output, up to rounding: see `InstanceNorm` and `FoldedUpBlock`.

    Args:
        in_channels: channels of a scan.
        out_channels: channels of the restored scan.
        feature_size: C, width of the embedding, a multiple of 12.
        local_mask_ratio: share of the embedding's channels to mask, see `LocalMasking`; 0 masks none.
        local_mask_fill: "zeros" or "noise".
        local_mask_shared: mask as published, see `SharedLocalMasking`.
        full_resolution_skip: the last stage of a Swin UNETR's decoder sees the input image itself, and with local
            masking alone the network can copy it. False puts zeros in the place of that skip and freezes `encoder1`.
        kwargs: see `SwinUNETRVariant`, by default a plain `SwinUNETR`.

    Shapes:
        image: (B, in_channels, D, H, W); D, H and W multiples of 32.
        restored: (B, out_channels, D, H, W).
        embedding (if asked for): (B, 16 * feature_size), the mean over space of the encoder's last hidden state.

    Raises:
        ValueError: for sides that are no multiples of 32.

    Randomness:
        see `LocalMasking`; in training mode only.

    Source:
        Valanarasu et al., "Disruptive Autoencoders", MIDL 2024.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        feature_size: int = 48,
        local_mask_ratio: float = 0.6,
        local_mask_fill: str = "zeros",
        local_mask_shared: bool = False,
        full_resolution_skip: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(in_channels=in_channels, out_channels=out_channels, feature_size=feature_size, **kwargs)
        # The embedding passes through the parameterless pos_drop before anything reads it: the seam for masking it.
        masking = SharedLocalMasking if local_mask_shared else LocalMasking
        self.swinViT.pos_drop = nn.Sequential(self.swinViT.pos_drop, masking(local_mask_ratio, local_mask_fill))
        self.full_resolution_skip = full_resolution_skip
        self.encoder1.requires_grad_(full_resolution_skip)
        # The same modules with a quicker forward. At the deeper stages folding would cost more than it saves.
        self.decoder1.__class__ = self.decoder2.__class__ = FoldedUpBlock
        for module in self.modules():
            if isinstance(module, nn.InstanceNorm3d) and not module.affine:
                module.__class__ = InstanceNorm

    def forward(
        self, image: torch.Tensor, return_embedding: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if not torch.jit.is_tracing():
            self._check_input_size(image.shape[2:])
        embedded, *hidden, deepest = self.swinViT(image, self.normalize)
        skips = (hidden[2], self.encoder4(hidden[1]), self.encoder3(hidden[0]), self.encoder2(embedded))
        x = self.encoder10(deepest)
        for decoder, skip in zip((self.decoder5, self.decoder4, self.decoder3, self.decoder2), skips, strict=True):
            x = decoder(x, skip)
        if self.full_resolution_skip:
            skip = self.encoder1(image)
        else:
            skip = x.new_zeros(x.shape[0], x.shape[1], *image.shape[2:])
        restored = self.out(self.decoder1(x, skip))
        return (restored, deepest.mean(dim=(2, 3, 4))) if return_embedding else restored
