import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from monai.networks.nets import SwinUNETR
from monai.transforms import RandAxisFlipd

from custom.errors import BadInput
from custom.evaluation.ensemble import TestTimeInferer, load_networks

FLIP = RandAxisFlipd("image", prob=0.75)


def ramp(images):
    """A network that is blind to its input: its logits grow along the first axis, wherever the scan has been turned."""
    grid = torch.arange(images.shape[2], dtype=torch.float32).reshape(1, 1, -1, 1, 1).expand(1, 1, *images.shape[2:])
    return torch.cat([grid, torch.zeros_like(grid)], 1) + 0 * images


def identity(images):
    return torch.cat([images, -images], 1)


def test_views_are_turned_back_before_they_are_averaged():
    """A network that answers voxel by voxel gives the same from every view."""
    image = MetaTensor(torch.rand(2, 1, 8, 6, 4), affine=torch.eye(4))
    inferer = TestTimeInferer(SimpleInferer(), FLIP, examples=8)
    plain = TestTimeInferer(SimpleInferer(), FLIP, examples=0)
    torch.testing.assert_close(inferer(image, identity), plain(image, identity), check_stride=False)
    assert torch.allclose(plain(image, identity).sum(1), torch.ones(2, 8, 6, 4))


def test_views_differ_and_are_the_same_in_every_run():
    image = MetaTensor(torch.rand(1, 1, 8, 6, 4), affine=torch.eye(4))
    inferer = TestTimeInferer(SimpleInferer(), FLIP, examples=8)
    averaged = torch.as_tensor(inferer(image, ramp))
    assert torch.equal(averaged, torch.as_tensor(inferer(image, ramp)))
    share = torch.as_tensor(ramp(image).softmax(1))
    mixed = [(n * share + (8 - n) * share.flip(2)) / 8 for n in range(1, 8)]  # n of 8 views as they are
    assert any(torch.allclose(averaged, candidate, atol=1e-6) for candidate in mixed)


def test_networks_are_copies_with_the_weights_of_their_checkpoints(tmp_path):
    networks = [SwinUNETR(in_channels=1, out_channels=2, feature_size=12) for _ in range(3)]
    paths = [tmp_path / f"{number}.pt" for number in range(2)]
    for network, path in zip(networks, paths, strict=False):
        torch.save(network.state_dict(), path)
    loaded = load_networks(networks[2], paths)
    assert len({id(network) for network in [*loaded, *networks]}) == 5
    for network, expected in zip(loaded, networks, strict=False):
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in network.state_dict().items())
    for wrong in ([], "model.pt"):
        with pytest.raises(BadInput, match="--checkpoints is a list"):
            load_networks(networks[2], wrong)
