"""The fused norm is torch's, on a GPU and without one by Triton's interpreter, where that package is installed."""

import pytest
import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
pytest.importorskip("triton")

from tools.studies.fused_norm import fused_norm  # noqa: E402


def expected(x, residual, normed):
    """By torch, in double precision, with its gradients."""
    inputs = [each.detach().double().requires_grad_() for each in (x, residual) if each is not None]
    z = F.instance_norm(inputs[0])
    if residual is not None:
        z = z + (F.instance_norm(inputs[1]) if normed else inputs[1])
    return F.leaky_relu(z, 0.01), inputs


FIRST, LAST = torch.contiguous_format, torch.channels_last_3d
# Small; of a channel cut into chunks; of more channels than a block of threads takes.
CASES = [((2, 5, 4, 3, 4), FIRST), ((2, 5, 4, 3, 4), LAST), ((1, 2, 17, 16, 16), FIRST), ((1, 3, 17, 16, 16), LAST)]
CASES += [((1, 70, 2, 3, 2), LAST)]


@pytest.mark.parametrize(("shape", "form"), CASES)
@pytest.mark.parametrize(("kind", "normed"), [(None, False), ("added", False), ("added", True)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_it_is_torch_s(shape, dtype, tolerance, kind, normed, form):
    generator = torch.Generator().manual_seed(0)

    def draw(offset):
        values = torch.randn(shape, generator=generator) * 2 + offset
        return values.to(DEVICE, dtype).contiguous(memory_format=form).requires_grad_()

    x, residual = draw(3), draw(-1) if kind else None
    gradient = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    found = fused_norm(x, residual, normed)
    reference, inputs = expected(x, residual, normed)
    found.backward(gradient)
    reference.backward(gradient.double())
    assert found.dtype == dtype and found.is_contiguous(memory_format=form)
    pairs = [(found, reference), (x.grad, inputs[0].grad)]
    pairs += [(residual.grad, inputs[1].grad)] if kind else []
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() < tolerance * theirs.norm()
