"""A recording of a training step computes what the step computes; on a GPU, where there is one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import SimpleInferer

from custom.speed.cuda_graph import CUDAGraphInferer
from tests.conftest import autoencoder

gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: CUDA_VISIBLE_DEVICES=0 python -m pytest FILE"
)


def train(inferer, network, images, zero_grad, autocast=False):
    """Train for a step on each image and return the losses and, of the last step, output and gradients."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    losses = []
    for step, image in enumerate(images):
        zero_grad(optimizer)
        torch.manual_seed(step)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            restored, embedding = inferer(image, network)
        loss = F.l1_loss(restored.float(), image) + embedding.float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradient = torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])
    return losses, restored.detach().float(), gradient


@gpu
@pytest.mark.parametrize("zero_grad", [lambda o: o.zero_grad(), lambda o: o.zero_grad(False), lambda o: None])
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 2e-3), (True, 5e-2)])
def test_a_replayed_training_is_the_training(zero_grad, autocast, tolerance):
    """Also with gradients that add up over steps, and with batches of another shape between."""
    torch.manual_seed(0)
    network = autoencoder().cuda().train()
    other = copy.deepcopy(network)
    images = [torch.rand(size, 1, 64, 64, 64, device="cuda") for size in (2, 2, 1, 2)]
    expected = train(SimpleInferer(), network, images, zero_grad, autocast)
    found = train(CUDAGraphInferer(), other, images, zero_grad, autocast)
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


@gpu
def test_what_is_masked_is_drawn_anew_and_recording_draws_nothing():
    network = autoencoder().cuda().train()
    image, inferer = torch.rand(1, 1, 64, 64, 64, device="cuda"), CUDAGraphInferer()
    torch.manual_seed(0)
    expected = [network(image)[0].detach() for _ in range(2)]
    torch.manual_seed(0)
    found = [inferer(image, network)[0].detach().clone() for _ in range(2)]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_on_a_cpu_it_is_a_simple_inferer():
    network = autoencoder(0).train()
    image = torch.rand(1, 1, 32, 32, 64)
    torch.testing.assert_close(CUDAGraphInferer()(image, network), network(image))
