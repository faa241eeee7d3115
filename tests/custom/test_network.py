import copy

import pytest
import torch
from monai.networks.nets import DynUNet, SegResNetDS, SwinUNETR
from torch import nn

from custom.errors import BadInput
from custom.loss import DisruptiveLoss
from custom.masking import LocalMasking
from custom.network import disruptive_autoencoder
from tests.conftest import BACKBONES, autoencoder, segmentation_network

IMAGE = torch.rand(2, 1, 64, 32, 32, generator=torch.Generator().manual_seed(0))
# Of each backbone: the embedding, the deepest features, and a part that left_out_skip takes the gradient from.
NAMES = {
    "swin": ("swinViT.pos_drop", "swinViT", "encoder1."),
    "resenc": ("encoder.stages.0", "encoder", None),
}


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stock(backbone) -> nn.Module:
    torch.manual_seed(0)
    return segmentation_network(backbone, classes=1).eval()


@pytest.fixture
def pretraining(stock, backbone):
    def make(ratio: float = 0.6, **kwargs) -> nn.Module:
        network = autoencoder(ratio, backbone=backbone, **kwargs)
        network.load_state_dict(stock.state_dict())
        return network

    return make


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return ((x - expected).norm() / expected.norm()).item()


def output_of(network: nn.Module, name: str, image: torch.Tensor):
    """What a submodule gives when the network is called."""
    found: list = []
    hook = network.get_submodule(name).register_forward_hook(lambda module, inputs, output: found.append(output))
    network(image)
    hook.remove()
    return found[0]


def test_weights_have_the_names_and_shapes_of_a_stock_network(stock, backbone):
    shapes = {name: value.shape for name, value in autoencoder(backbone=backbone).state_dict().items()}
    assert shapes == {name: value.shape for name, value in stock.state_dict().items()}
    assert type(autoencoder(backbone=backbone)) is type(stock)


@torch.no_grad()
def test_in_eval_mode_it_is_the_stock_network(stock, pretraining):
    network = pretraining().eval()
    # Two voxels at the bottleneck: their norm amplifies rounding.
    assert relative_error(network(IMAGE), stock(IMAGE)) < 1e-4


@torch.no_grad()
def test_in_training_mode_the_mean_of_the_deepest_features_comes_too(stock, backbone, pretraining):
    network = pretraining(ratio=0).train()
    restored, embedding = network(IMAGE)
    assert torch.equal(restored, network.eval()(IMAGE))
    deepest = output_of(stock, NAMES[backbone][1], IMAGE)[-1]
    assert torch.equal(embedding, deepest.mean((2, 3, 4))) and embedding.shape == deepest.shape[:2]
    assert deepest.shape[2:] == (2, 1, 1)


class WrittenOut(SwinUNETR):
    """MONAI's forward, line by line, with the method's two lines in it; nothing of ours but the masking."""

    masking = LocalMasking(0.6)

    def forward(self, image):
        vit, hidden = self.swinViT, []
        x = self.masking(vit.pos_drop(vit.patch_embed(image)))  # the method's first
        hidden.append(vit.proj_out(x, self.normalize))
        for stage in (vit.layers1, vit.layers2, vit.layers3, vit.layers4):
            x = stage[0](x.contiguous())
            hidden.append(vit.proj_out(x, self.normalize))
        skips = [self.encoder1(image), self.encoder2(hidden[0]), self.encoder3(hidden[1]), self.encoder4(hidden[2])]
        x = self.decoder5(self.encoder10(hidden[4]), hidden[3])
        for block, skip in zip((self.decoder4, self.decoder3, self.decoder2, self.decoder1), skips[::-1], strict=True):
            x = block(x, skip)
        return self.out(x), hidden[4].mean((2, 3, 4))  # and its second


def test_a_swin_unetr_is_pre_trained_as_by_the_method_written_out():
    """The same losses to the last digit, from the same seed."""
    losses = []
    for hooked in (True, False):
        torch.manual_seed(0)
        network = (SwinUNETR if hooked else WrittenOut)(1, 1, feature_size=12, window_size=4)
        if hooked:
            network = disruptive_autoencoder(network, masking=LocalMasking(0.6))
        optimizer, loss = torch.optim.AdamW(network.parameters(), lr=1e-3), DisruptiveLoss()
        for _ in range(3):
            optimizer.zero_grad()
            found = loss(network(IMAGE + 0.1), {"image": IMAGE, "modality": torch.tensor([0, 1])})
            found.backward()
            optimizer.step()
            losses.append(found.item())
    assert losses[:3] == losses[3:] and len(set(losses)) == 3


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own(pretraining):
    network = pretraining(ratio=0).train()
    copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        parameter.mul_(1.1)
    expected = copied(IMAGE)[1]
    assert not torch.equal(network(IMAGE)[1], expected) and torch.equal(copied(IMAGE)[1], expected)


def test_its_gradients_are_those_of_the_stock_network(stock, pretraining):
    """In float64, where rounding hides nothing: the output is the same function, and so are all gradients."""
    networks = [network.double().train() for network in (copy.deepcopy(stock), pretraining(ratio=0))]
    image = IMAGE[:1].double()
    outputs = [networks[0](image), networks[1](image)[0]]
    assert relative_error(outputs[1], outputs[0]) < 1e-10
    for output in outputs:
        (output - image).abs().mean().backward()
    for (name, p), expected in zip(networks[1].named_parameters(), networks[0].parameters(), strict=True):
        if expected.grad is None:  # of an output layer for deep supervision
            assert p.grad is None and ".seg_layers." in name
        elif expected.grad.norm() > 1e-12:  # rounding is all that a bias before a norm gets
            assert relative_error(p.grad, expected.grad) < 1e-8, name


def test_gradient_checkpointing_changes_no_gradient():
    networks = [autoencoder(ratio=0, use_checkpoint=checkpointing) for checkpointing in (False, True)]
    networks[1].load_state_dict(networks[0].state_dict())
    for network in networks:
        network.train()(IMAGE[:1])[0].square().mean().backward()
    for p, other in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.allclose(p.grad, other.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_in_training_mode_the_embedding_is_masked_as_configured(stock, backbone, pretraining):
    name = NAMES[backbone][0]
    masked, unmasked = output_of(pretraining(ratio=0.6).train(), name, IMAGE), output_of(stock, name, IMAGE)
    zero = (masked == 0).flatten(2).all(2)
    assert zero.sum(1).tolist() == [round(0.6 * masked.shape[1])] * 2
    assert torch.equal(masked[~zero], unmasked[~zero])


def test_the_full_resolution_skip_carries_the_input_only_if_switched_on(backbone, pretraining):
    """With everything masked, and no skip, nothing but the shape of the input is left.

    In a residual-encoder U-Net the skip starts at the embedding, so that it is masked too.
    """
    for skip in (True, False):
        torch.manual_seed(0)
        network = pretraining(ratio=1.0, skip=skip).train()
        image = IMAGE[:1].clone().requires_grad_()
        network(image)[0].sum().backward()
        assert bool(image.grad.abs().sum() > 0) is (skip and backbone == "swin")
        frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
        assert bool(frozen) is (NAMES[backbone][2] is not None and not skip)
        assert all(name.startswith(NAMES[backbone][2]) for name in frozen)


@torch.no_grad()
def test_tracing_is_exact(pretraining):
    network = pretraining().eval()
    traced = torch.jit.trace(network, IMAGE[:1])
    assert torch.allclose(traced(IMAGE[1:]), network(IMAGE[1:]), atol=1e-6)


def test_sides_that_are_no_multiples_of_32_are_refused():
    with pytest.raises(ValueError, match="divisible"):
        autoencoder()(torch.zeros(1, 1, 64, 64, 48))


@pytest.mark.parametrize(
    "network, embedding, features",
    [
        (SegResNetDS(init_filters=8, out_channels=1), "encoder.conv_init", "encoder"),
        (DynUNet(3, 1, 1, [3] * 3, [1, 2, 2], [2, 2], filters=[8, 16, 32]), "input_block", "bottleneck"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_networks_are_pre_trained_by_names_alone(network, embedding, features):
    before = network.state_dict().keys()
    network = disruptive_autoencoder(network, embedding, features, LocalMasking(0.5)).train()
    restored, deepest = network(IMAGE)
    assert restored.shape == IMAGE.shape and deepest.shape[0] == 2 and deepest.ndim == 2
    assert network.state_dict().keys() == before
    assert (output_of(network, embedding, IMAGE) == 0).flatten(2).all(2).sum(1).tolist() == [4, 4]


@pytest.mark.parametrize(
    "embedding, features, told",
    [
        ("encoder.stages.9", "encoder", "no submodule 'encoder.stages.9'; did you mean `encoder.stages."),
        ("decoder.seg_layers.0", "encoder", "does not call the submodule that `embedding` names"),
        ("encoder.stem", "decoder.seg_layers.0", "does not call the submodule that `features` names"),
    ],
)
def test_names_that_are_not_there_or_not_called_are_refused(embedding, features, told):
    """The first outputs of nnU-Net's decoder are there for deep supervision alone."""
    with pytest.raises(BadInput) as caught:
        disruptive_autoencoder(segmentation_network("resenc"), embedding, features).train()(IMAGE)
    assert told in str(caught.value)
