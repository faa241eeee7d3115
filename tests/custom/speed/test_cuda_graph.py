"""A recording of a training step computes what the step computes; on a GPU, where there is one."""

import contextlib
import copy
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from monai.inferers import SimpleInferer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from custom.speed.cuda_graph import CUDAGraphInferer
from tests.conftest import autoencoder, fork_server


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


@pytest.mark.gpu
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


@pytest.mark.gpu
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


class Recorder(TorchDispatchMode):
    """A double of `torch.cuda.CUDAGraph` for a CPU: its operators run again on the same memory when it is replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []
        self.replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, output))
        return output

    def pool(self):
        return None

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, output in self.calls:
            for recorded, anew in zip(tree_leaves(output), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(recorded, torch.Tensor) and recorded.data_ptr() != anew.data_ptr():
                    recorded.copy_(anew)


@pytest.fixture
def recorder(monkeypatch):
    record_on_a_cpu(monkeypatch)


def record_on_a_cpu(monkeypatch):
    """Let a CPU record as a GPU does."""
    monkeypatch.setattr(CUDAGraphInferer, "device_type", "cpu")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool=None, capture_error_mode=None: graph)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock)
    for name in ("current_stream", "stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    fork_rng = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork_rng([]))


class Small(nn.Module):
    """What can go wrong, in few weights: two outputs, masks that are drawn anew, a weight that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.GELU())
        self.decoder = nn.Conv3d(4, 1, 3, padding=1)
        self.decoder.bias.requires_grad_(False)

    def forward(self, image):
        hidden = self.encoder(image)
        return self.decoder(hidden * torch.rand_like(hidden).gt(0.6)), hidden.mean((2, 3, 4))


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.parametrize("zero_grad", [lambda o: o.zero_grad(), lambda o: o.zero_grad(False), lambda o: None])
def test_gradients_of_a_recording_reach_the_weights(zero_grad, recorder):
    """As above, on a CPU, by the double: the order of the sums is another, and nothing else."""
    torch.manual_seed(0)
    network = Small().train()
    other = copy.deepcopy(network)
    images = [torch.rand(size, 1, 6, 5, 4) for size in (2, 2, 1, 2)]
    expected = train(SimpleInferer(), network, images, zero_grad)
    inferer = CUDAGraphInferer()
    found = train(inferer, other, images, zero_grad)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert other.decoder.bias.grad is None
    graphs = inferer.recording.forward, inferer.recording.backward
    inferer(images[0], other.eval())
    assert [graph.replays for graph in graphs] == [3, 3]  # not for the batch of another shape, nor in evaluation


def train_in_a_process(rank: int, folder: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        record_on_a_cpu(monkeypatch)
        compare_with_ddp(rank, folder)


def compare_with_ddp(rank: int, folder: str) -> None:
    """Train with DDP's own passes and with recorded ones, each process on other images; keep all gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = []
    for inferer in (SimpleInferer(), CUDAGraphInferer()):
        torch.manual_seed(rank)  # DDP gives all the weights of the first
        network = DistributedDataParallel(Small().train(), static_graph=isinstance(inferer, CUDAGraphInferer))
        generator = torch.Generator().manual_seed(rank)
        gradients = []
        # Batches of another shape, and gradients that add up: over two passes without, then with an average.
        for size, accumulate in ((2, False), (2, True), (2, False), (1, False), (1, True), (2, False)):
            image = torch.rand(size, 1, 6, 5, 4, generator=generator)
            torch.manual_seed(size)
            with network.no_sync() if accumulate else contextlib.nullcontext():
                restored, embedding = inferer(image, network)
                (F.l1_loss(restored, image) + embedding.square().mean()).backward()
            gradients.append([weight.grad.clone() for weight in network.parameters() if weight.requires_grad])
            if not accumulate:
                network.zero_grad()
        found.append(gradients)
    replays = inferer.recording.forward.replays
    torch.save((*found, replays), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_average_the_gradients_of_a_recording_as_ddp_does(tmp_path):
    fork_server()
    multiprocessing.start_processes(train_in_a_process, (str(tmp_path),), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for expected, found, replays in ranks:
        assert replays == 4
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ranks[0][1][-1], ranks[1][1][-1], rtol=0, atol=0)
    assert (ranks[0][1][1][0] - ranks[1][1][1][0]).abs().max() > 1e-4  # each its own, where nothing was averaged
