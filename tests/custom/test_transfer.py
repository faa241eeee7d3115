import logging
from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import SwinUNETR

from custom.engine.checkpoint import load_weights, read_weights
from custom.errors import BadInput
from custom.transfer import transfer
from tests import conftest
from tests.conftest import autoencoder, each_backbone

# The names of each backbone's encoder, decoder and output layer; a residual-encoder U-Net's decoder holds the encoder.
PARTS = {
    "swin": (
        ("swinViT.", "encoder1.", "encoder2.", "encoder3.", "encoder4.", "encoder10."),
        ("decoder1.", "decoder2.", "decoder3.", "decoder4.", "decoder5."),
        ("out.",),
    ),
    "resenc": (("encoder.", "decoder.encoder."), ("decoder.stages.", "decoder.transpconvs."), ("decoder.seg_layers.",)),
}


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """A network in which every value differs from an initial one, also biases and norms."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return network


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Weights of a pre-training network."""
    path = tmp_path_factory.mktemp("pretrained") / "model.pt"
    torch.save(randomised(autoencoder()).state_dict(), path)
    return path


def segmentation_network(**kwargs):
    return SwinUNETR(
        in_channels=kwargs.pop("in_channels", 1), out_channels=5, **{"feature_size": 12, "window_size": 4, **kwargs}
    )


@each_backbone
@pytest.mark.parametrize("parts", ["encoder", "decoder", "both"])
def test_exactly_the_parts_asked_for_come_over(parts, backbone, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    weights, checkpoint = randomised(autoencoder(backbone=backbone)).state_dict(), tmp_path / "model.pt"
    torch.save(weights, checkpoint)
    encoder, decoder, output = PARTS[backbone]
    prefixes = {"encoder": encoder, "decoder": decoder, "both": encoder + decoder}[parts]
    network = conftest.segmentation_network(backbone, classes=5)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    left = transfer(network, checkpoint, parts)
    came = set()
    for name, value in network.state_dict().items():
        expected = name.startswith(prefixes)
        came |= {value.data_ptr()} if expected else set()
        assert torch.equal(value, weights[name] if expected else before[name]), name
        assert not (expected and name in left)
    new = {name for name in left if left[name] == "the output layer is new"}
    assert new == {name for name in before if name.startswith(output)}
    total = len({value.data_ptr() for value in network.state_dict().values()})
    assert f"{len(came)} of {total} tensors start from {checkpoint} (--transfer {parts})" in caplog.text
    assert f"{len(new)} start anew, the output layer is new: {min(new)}" in caplog.text
    assert len(left) == total - len(came)


def test_without_a_checkpoint_nothing_changes_and_it_is_said(caplog):
    caplog.set_level(logging.INFO)
    network = segmentation_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert transfer(network, None) == {}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert "from scratch" in caplog.text


def test_several_channels_start_from_one(pretrained):
    """Four copies of a scan give what the scan gave alone."""
    single, several = segmentation_network().eval(), segmentation_network(in_channels=4).eval()
    transfer(single, pretrained)
    left = transfer(several, pretrained)
    assert set(left.values()) == {"the output layer is new"}
    several.out.load_state_dict(single.out.state_dict())
    image = torch.rand(1, 1, 64, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(several(image.expand(-1, 4, -1, -1, -1)), single(image), atol=1e-4, rtol=1e-4)


@each_backbone
@pytest.mark.parametrize("channels", [1, 2])
def test_one_or_two_channels_start_from_four(channels, backbone, tmp_path):
    """What the checkpoint made of four copies of a scan, the network makes of its own copies."""
    torch.manual_seed(1)
    four, network = (conftest.segmentation_network(backbone, in_channels=count).eval() for count in (4, channels))
    torch.save(four.state_dict(), tmp_path / "four.pt")
    assert set(transfer(network, tmp_path / "four.pt").values()) == {"the output layer is new"}
    output = {name: v for name, v in four.state_dict().items() if name.startswith(PARTS[backbone][2])}
    network.load_state_dict(output, strict=False)
    image = torch.rand(1, 1, 64, 32, 32)
    with torch.no_grad():
        copies = (image.expand(-1, count, -1, -1, -1) for count in (channels, 4))
        torch.testing.assert_close(network(next(copies)), four(next(copies)), atol=1e-4, rtol=1e-4)


def test_a_partial_transfer_is_a_warning_and_one_of_less_than_half_an_error(pretrained, tmp_path, caplog):
    weights = read_weights(pretrained)
    few = dict(list(weights.items())[:11])
    torch.save(few, tmp_path / "few.pt")
    network = segmentation_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sentence = r"few.pt has 11 of the \d+ tensors of --transfer both, 7%; .*--least_transferred"
    with pytest.raises(BadInput, match=sentence):
        transfer(network, tmp_path / "few.pt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    transfer(network, tmp_path / "few.pt", least_share=0.05)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "few.pt has 11 of the" in warning.getMessage()
    caplog.clear()
    transfer(network, pretrained)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_state_of_a_run_and_of_parallel_training_are_read_too(pretrained, tmp_path):
    weights = read_weights(pretrained)
    torch.save({"model": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, tmp_path / "run.pt")
    network = segmentation_network()
    transfer(network, tmp_path / "run.pt")
    assert torch.equal(
        network.state_dict()["swinViT.patch_embed.proj.weight"], weights["swinViT.patch_embed.proj.weight"]
    )


def test_what_a_checkpoint_lacks_is_reported(pretrained, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    weights = {name: value for name, value in read_weights(pretrained).items() if name.startswith("swinViT")}
    torch.save({**weights, "extra": torch.ones(1)}, tmp_path / "encoder.pt")
    left = transfer(segmentation_network(), tmp_path / "encoder.pt")
    assert (
        left["encoder10.layer.conv1.conv.weight"] == left["decoder1.transp_conv.conv.weight"] == "not in the checkpoint"
    )
    assert (
        "start anew, not in the checkpoint: decoder1" in caplog.text and "no place in the network: extra" in caplog.text
    )


class Code:
    """An object whose unpickling would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_bad_checkpoints_are_refused_and_leave_the_network(pretrained, tmp_path):
    torch.save(autoencoder(feature_size=24).state_dict(), tmp_path / "larger.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    torch.save({"model": Code(tmp_path / "written")}, tmp_path / "code.pt")
    (tmp_path / "short.pt").write_bytes(pretrained.read_bytes()[:5000])
    network = segmentation_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for name, sentence in {
        "missing.pt": "no checkpoint",
        "larger.pt": "another size.*feature_size",
        "other.pt": "Nothing in the checkpoint.*fits",
        "none.pt": "no network's weights",
        "code.pt": "can't be loaded",
        "short.pt": "can't be loaded",
    }.items():
        with pytest.raises(BadInput, match=sentence) as error:
            transfer(network, tmp_path / name)
        assert name in str(error.value)
    with pytest.raises(BadInput, match="--transfer is one of"):
        transfer(network, pretrained, "encodr")
    assert not (tmp_path / "written").exists()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(BadInput, match="larger.pt can't be loaded, it is of another network"):
        load_weights(network, tmp_path / "larger.pt")


def test_sizes_that_differ_from_the_pre_training_s_are_told_with_both_values(tmp_path, caplog, monkeypatch):
    state = autoencoder().state_dict()
    state.training = {"settings": {"feature_size": 12, "pixdim_mm": [2, 2, 2], "patch_size": [64, 64, 64]}}
    (tmp_path / "run" / "models").mkdir(parents=True)
    torch.save(state, tmp_path / "run" / "models" / "model.pt")
    config = {"feature_size": 12, "pixdim_mm": None, "patch_size": [64, 64, 64]}
    workflow = SimpleNamespace(parser=SimpleNamespace(config=config))
    monkeypatch.setattr("custom.transfer.running_workflow", lambda: workflow)
    transfer(segmentation_network(), tmp_path / "run")  # the folder of a run stands for its weights
    assert (
        "was trained with pixdim_mm [2, 2, 2], and here it is null." in caplog.text and "patch_size" not in caplog.text
    )
    config["feature_size"] = 24
    with pytest.raises(BadInput, match="of another size: .* It was trained with feature_size 12, and here it is 24"):
        transfer(segmentation_network(feature_size=24), tmp_path / "run")
