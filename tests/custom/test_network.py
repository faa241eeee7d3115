import copy

import pytest
import torch
from monai.networks.nets import SwinUNETR

from tests.conftest import autoencoder

IMAGE = torch.rand(2, 1, 64, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stock() -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(in_channels=1, out_channels=1, feature_size=12).eval()


def pretraining(stock: SwinUNETR, ratio: float = 0.6, **kwargs) -> SwinUNETR:
    network = autoencoder(ratio, **kwargs)
    network.load_state_dict(stock.state_dict())
    return network


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return ((x - expected).norm() / expected.norm()).item()


def test_weights_have_the_names_and_shapes_of_a_stock_swin_unetr(stock):
    shapes = {name: value.shape for name, value in autoencoder().state_dict().items()}
    assert shapes == {name: value.shape for name, value in stock.state_dict().items()}


@torch.no_grad()
def test_in_eval_mode_it_is_a_stock_swin_unetr(stock):
    network = pretraining(stock).eval()
    # Two voxels at the bottleneck: their norm amplifies rounding.
    assert relative_error(network(IMAGE), stock(IMAGE)) < 1e-4


@torch.no_grad()
def test_in_training_mode_the_mean_of_the_deepest_features_comes_too(stock):
    network = pretraining(stock, ratio=0).train()
    restored, embedding = network(IMAGE)
    assert torch.equal(restored, network.eval()(IMAGE))
    assert torch.equal(embedding, stock.swinViT(IMAGE)[-1].mean((2, 3, 4))) and embedding.shape == (2, 192)


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own(stock):
    network = pretraining(stock, ratio=0).train()
    copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        parameter.mul_(1.1)
    expected = copied(IMAGE)[1]
    assert not torch.equal(network(IMAGE)[1], expected) and torch.equal(copied(IMAGE)[1], expected)


def test_its_gradients_are_those_of_a_stock_swin_unetr(stock):
    """In float64, where rounding hides nothing: the output is the same function, and so are all gradients."""
    networks = [network.double().train() for network in (copy.deepcopy(stock), pretraining(stock, ratio=0))]
    image = IMAGE[:1].double()
    outputs = [networks[0](image), networks[1](image)[0]]
    assert relative_error(outputs[1], outputs[0]) < 1e-10
    for output in outputs:
        (output - image).abs().mean().backward()
    for (name, p), expected in zip(networks[1].named_parameters(), networks[0].parameters(), strict=True):
        assert relative_error(p.grad, expected.grad) < 1e-8, name


def test_gradient_checkpointing_changes_no_gradient(stock):
    networks = [pretraining(stock, ratio=0, use_checkpoint=checkpointing) for checkpointing in (False, True)]
    for network in networks:
        network.train()(IMAGE[:1])[0].square().mean().backward()
    for p, other in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.allclose(p.grad, other.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_in_training_mode_the_embedding_is_masked_as_configured(stock):
    network = pretraining(stock, ratio=0.6).train()
    hidden = network.swinViT(IMAGE, normalize=False)[0]
    unmasked = stock.swinViT(IMAGE, normalize=False)[0]
    zero = (hidden == 0).flatten(2).all(2)
    assert zero.sum(1).tolist() == [7, 7]  # round(0.6 * 12)
    assert torch.equal(hidden[~zero], unmasked[~zero])


def test_the_full_resolution_skip_carries_the_input_only_if_switched_on(stock):
    """With everything masked, and no skip, nothing but the shape of the input is left."""
    for skip in (True, False):
        torch.manual_seed(0)
        network = pretraining(stock, ratio=1.0, skip=skip).train()
        image = IMAGE[:1].clone().requires_grad_()
        network(image)[0].sum().backward()
        assert bool(image.grad.abs().sum() > 0) is skip
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        assert any(name.startswith("encoder1.") for name in trained) is skip


@torch.no_grad()
def test_tracing_is_exact(stock):
    network = pretraining(stock).eval()
    traced = torch.jit.trace(network, IMAGE[:1])
    assert torch.allclose(traced(IMAGE[1:]), network(IMAGE[1:]), atol=1e-6)


def test_sides_that_are_no_multiples_of_32_are_refused(stock):
    with pytest.raises(ValueError, match="divisible"):
        pretraining(stock)(torch.zeros(1, 1, 64, 64, 48))
