"""Two processes with one sample each are one process with both."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from custom.loss import CrossModalContrastiveLoss, DisruptiveLoss
from tests.conftest import autoencoder, fork_server


def gradients(network, images, targets) -> dict[str, torch.Tensor]:
    DisruptiveLoss(50.0)(network(images), targets).backward()
    return {name.removeprefix("module."): p.grad for name, p in network.named_parameters()}


def batch() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 1, 64, 32, 32, generator=generator, dtype=torch.float64)
    return images + 0.1, {"image": images, "modality": torch.tensor([4, 9])}


def network() -> torch.nn.Module:
    """In float64, because two voxels at the bottleneck amplify rounding; the contrastive loss itself is in float32."""
    torch.manual_seed(0)
    # No local masking: two processes would draw other masks than one.
    return autoencoder(0).double()


def contrastive(mine: slice) -> torch.Tensor:
    """Of four embeddings, of which the first alone is of its modality: each has to stay with its own."""
    embedding = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    return CrossModalContrastiveLoss()(embedding[mine], torch.tensor([4, 9, 9, 9])[mine])


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    images, targets = batch()
    mine = slice(rank, rank + 1)
    found = gradients(
        DistributedDataParallel(network()), images[mine], {key: value[mine] for key, value in targets.items()}
    )
    loss = contrastive(slice(2 * rank, 2 * rank + 2))
    if rank == 0:
        torch.save((found, loss), f"{folder}/found.pt")
    dist.destroy_process_group()


def test_two_processes_with_one_sample_give_the_gradients_of_one_with_two(tmp_path):
    fork_server()
    multiprocessing.start_processes(process, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    parallel, loss = torch.load(tmp_path / "found.pt", weights_only=True)
    assert torch.allclose(loss, contrastive(slice(4)))
    images, targets = batch()
    single = gradients(network(), images, targets)
    largest = max(gradient.abs().max() for gradient in single.values())
    for name, gradient in single.items():
        assert torch.allclose(parallel[name], gradient, rtol=1e-4, atol=1e-7 * largest), name
    # The test would not notice a contrastive term that is never there: it has no part in the decoder's gradients, and
    # the sum of both differs from the reconstruction's alone in the encoder.
    lone = network()
    DisruptiveLoss(0)(lone(images), targets).backward()
    alone = {name: p.grad for name, p in lone.named_parameters()}
    assert torch.allclose(alone["out.conv.conv.weight"], single["out.conv.conv.weight"])
    layer = "swinViT.layers4.0.blocks.0.mlp.linear2.weight"
    assert not torch.allclose(alone[layer], single[layer], rtol=1e-2)
