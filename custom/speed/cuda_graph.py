"""How a training runs its network on a GPU: the kernels of a step are recorded once, and then replayed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from monai.inferers import SimpleInferer
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves


class CUDAGraphInferer(SimpleInferer):
    """MONAI's `SimpleInferer`, whose training passes a GPU replays from a recording (a CUDA graph).

    A training step of a Swin UNETR launches thousands of small kernels, which can take a CPU longer than it takes the
    GPU to run them. The first training batch is recorded, forward and backward, and batches of its shape are replayed.
    All else is run as it comes: other shapes, evaluation, a CPU, gradient checkpointing, which can't be recorded.
    Weights that do not require gradients at the first batch get none later.

    With several processes the network within `DistributedDataParallel` is recorded, and its gradients are averaged
    after the backward pass, in one call; not under `no_sync`.

    Memory that the recording uses is kept as long as the inferer.

    Shapes:
        inputs: (B, C, ...); output: what the network gives, valid until the next call.

    Randomness:
        the GPU's generator, as the network itself uses it; recording leaves it as it was.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        super().__init__()
        self.recording: Recording | None = None

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = inputs.device.type != self.device_type or not network.training
        if isinstance(network, DistributedDataParallel) and not plain:
            outputs = self(inputs, network.module, *args, **kwargs)
            if network.require_backward_grad_sync:
                average_after_backward(outputs, network)
            return outputs
        if plain or any(getattr(module, "use_checkpoint", False) for module in network.modules()):
            return super().__call__(inputs, network, *args, **kwargs)
        if self.recording is None:
            self.recording = Recording(inputs, network, *args, **kwargs)
        if inputs.shape != self.recording.inputs.shape:
            return super().__call__(inputs, network, *args, **kwargs)
        return self.recording(inputs)


def average_after_backward(outputs: Any, network: DistributedDataParallel) -> None:
    """Average the network's gradients over the processes as soon as a backward pass from its outputs has ended."""

    def average() -> None:
        gradients = [weight.grad for weight in network.module.parameters() if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / network.process_group.size()
        dist.all_reduce(flat, group=network.process_group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    # Called by the first gradient to come; what it queues is called when all have been added to the weights'.
    backward = torch.autograd.Variable._execution_engine
    leaves = [output for output in tree_leaves(outputs) if output.requires_grad]
    if leaves:
        register_multi_grad_hook(leaves, lambda _: backward.queue_callback(average), mode="any")


class Recording:
    """Forward and backward pass of a network on inputs of one shape, as CUDA graphs.

    torch's `make_graphed_callables` records in a mode in which no other thread may use the GPU, and a data loader that
    pins memory does.

    Args:
        inputs, network, args, kwargs: of the call that is recorded; autocast is what it is during it.
    """

    def __init__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.inputs = inputs.detach().clone()
        trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self.weights = list(trained.values())
        # The same memory, but nothing that has been computed with them before is tied to another stream.
        aliases = {name: weight.detach().requires_grad_() for name, weight in trained.items()}
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )

        def forward() -> tuple[torch.Tensor, ...]:
            with autocast:
                output = functional_call(network, aliases, (self.inputs, *args), kwargs)
            self.single = isinstance(output, torch.Tensor)
            return (output,) if self.single else tuple(output)

        def backward(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
            return torch.autograd.grad(outputs, list(aliases.values()), self.gradients, allow_unused=True)

        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.random.fork_rng([inputs.device]):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # libraries set themselves up in the first calls
                    outputs = forward()
                    self.gradients = tuple(torch.zeros_like(output) for output in outputs)
                    backward(outputs)
            torch.cuda.synchronize()
            del outputs
            with torch.cuda.graph(self.forward, capture_error_mode="thread_local"):
                self.outputs = forward()
            with torch.cuda.graph(self.backward, self.forward.pool(), capture_error_mode="thread_local"):
                self.weight_gradients = backward(self.outputs)

    def __call__(self, inputs: torch.Tensor) -> Any:
        for weight in self.weights:
            if weight.grad is None:  # else it would be the recording's own memory, which the next replay overwrites
                weight.grad = torch.zeros_like(weight)
        outputs = Replay.apply(self, inputs, *self.weights)
        return outputs[0] if self.single else outputs


class Replay(torch.autograd.Function):
    """A recording, to autograd one function of the inputs and the weights."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, inputs: torch.Tensor, *weights: nn.Parameter) -> tuple:
        ctx.recording = recording
        recording.inputs.copy_(inputs)
        recording.forward.replay()
        return tuple(output.detach() for output in recording.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        recording = ctx.recording
        for recorded, gradient in zip(recording.gradients, gradients, strict=True):
            recorded.copy_(gradient)
        recording.backward.replay()
        return None, None, *recording.weight_gradients
