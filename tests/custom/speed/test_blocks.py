"""The quicker blocks compute what MONAI's and torch's do; a whole network of them: see `test_network`."""

import pytest
import torch
from monai.networks.nets import SwinUNETR
from torch import nn

from custom.speed.blocks import FoldedUpBlock, InstanceNorm, use_quick_blocks

IMAGE = torch.rand(2, 1, 64, 32, 32, generator=torch.Generator().manual_seed(0))


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return ((x - expected).norm() / expected.norm()).item()


def test_they_are_in_use():
    network = use_quick_blocks(SwinUNETR(in_channels=1, out_channels=1, feature_size=12))
    norms = [module for module in network.modules() if isinstance(module, nn.InstanceNorm3d)]
    assert norms and all(type(norm) is InstanceNorm for norm in norms)
    folded = {name for name, child in network.named_children() if isinstance(child, FoldedUpBlock)}
    assert folded == {"decoder1", "decoder2"}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_instance_norm_is_torch_s_and_keeps_half_precision(dtype, tolerance):
    image = (IMAGE * 3 + 5).to(dtype).requires_grad_()
    expected_image = image.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        normed = InstanceNorm(1)(image)
    expected = nn.InstanceNorm3d(1)(expected_image)
    assert normed.dtype == dtype
    assert relative_error(normed, expected) < tolerance
    (normed.double() ** 3).sum().backward()
    (expected**3).sum().backward()
    assert relative_error(image.grad, expected_image.grad) < 2 * tolerance
