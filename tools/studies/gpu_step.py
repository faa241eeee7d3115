"""Find where a training step's time goes on a GPU, and what would save it: checked and timed in one call.

    python -m tools.studies.gpu_step OUT --minutes 5

The step is that of tools.studies.speed: bfloat16, replayed from a recording, fused AdamW. First come what the card can
do, the step with its check, and its profile by families of operators, each with its floor: the fewest bytes that it has
to move over the bandwidth, or its operations over the rate. Then the candidates, the largest predicted gain first: one
at a time, then together. Each starts from the same weights, is compared with the network in float32 on the same input
and masks (relative error of the output and of all gradients: at most twice that of the step itself, which has one by
bfloat16), and is timed replayed. Predictions stand in `CANDIDATES`, in milliseconds on an H200 at the published size,
written down before any was measured there.

Each part runs in one process that goes on to the next; if a part crashes or takes too long, another process takes over.
OUT/gpu_step.jsonl has a line for each part as soon as it ends, OUT/gpu_step.md a table. On a CPU everything runs, in
single precision and without a recording: to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.distributed as dist
import torch.nn.functional as F
from monai.inferers import SimpleInferer
from monai.networks.blocks import UnetResBlock
from monai.networks.nets.swin_unetr import SwinTransformerBlock, WindowAttention, get_window_size, window_partition
from torch import nn
from torch.autograd import DeviceType
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from custom.disruption import Disrupt
from custom.engine.config_check import check_patch_size
from custom.errors import BadInput
from custom.loss import DisruptiveLoss
from custom.speed.blocks import FoldedUpBlock
from custom.speed.cuda_graph import CUDAGraphInferer
from custom.text import markdown_table
from tools._cli import tool
from tools.studies.speed import DEFAULT, device, make_network, peak_mb, seconds

STEP = "the bundle's step"
ALL = frozenset({"triton", "channels_last", "sdpa", "cast", "gather"})
# What is added to the step (or, "-", taken from it), the batch, and the milliseconds that are predicted.
CANDIDATES: dict[str, tuple[frozenset[str], int, float | None]] = {
    STEP: (frozenset(), 1, 56),
    "norm, residual and activation fused": (frozenset({"triton"}), 1, 43),
    "fused, and channels last": (frozenset({"triton", "channels_last"}), 1, 35),
    "all: also attention, casts and windows": (ALL, 1, 28),
    "all, decoder stages not folded": (ALL | {"-folding"}, 1, 29),
    "all, algorithms chosen by trying (benchmark)": (ALL | {"benchmark"}, 1, 26),
    "all, batch 2": (ALL, 2, 50),
    "all, batch 4": (ALL, 4, 95),
    "attention by scaled_dot_product_attention": (frozenset({"sdpa"}), 1, 51),
    "attention's scores in half precision": (frozenset({"half_scores"}), 1, 53),
    "weights cast once": (frozenset({"cast"}), 1, 55),
    "windows by one gather": (frozenset({"gather"}), 1, 54),
    "algorithms chosen by trying (benchmark)": (frozenset({"benchmark"}), 1, 53),
    "channels last": (frozenset({"channels_last"}), 1, 60),
    "reduced over processes, one process": (frozenset({"processes"}), 1, 57),
    "the bundle's step, batch 2": (frozenset(), 2, 105),
    "the bundle's step, batch 4": (frozenset(), 4, 205),
    "torch.compile, backend cudagraphs": (frozenset({"compile:cudagraphs"}), 1, 57),
    "torch.compile, reduce-overhead": (frozenset({"compile:reduce-overhead"}), 1, 38),
}
TOLERANCE = 2, 1e-3  # times the error of the step itself, and in single precision, where that one has none
PATIENCE = {"torch.compile, backend cudagraphs": 120, "torch.compile, reduce-overhead": 180}  # seconds, at least
FAMILIES = {
    "convolutions": "conv",
    "instance norm": "group_norm|instance_norm",
    "layer norm": "layer_norm",
    "matrix products, attention": r"mm|linear|attention|softmax",
    "copies and casts": "copy|clone|cat|roll|pad|index|gather",
    "optimizer": "adam|foreach",
}


def halved() -> torch.dtype:
    """Return the type that matrix products have now."""
    enabled = torch.is_autocast_enabled(device().type)
    return torch.get_autocast_dtype(device().type) if enabled else torch.float32


# Candidates: norms


def plain_norm(x: torch.Tensor, residual: torch.Tensor | None = None, normed: bool = False) -> torch.Tensor:
    """As `fused_norm.fused_norm`, by torch."""
    with torch.autocast(x.device.type, enabled=False):
        output = F.group_norm(x, x.shape[1])
        if residual is not None:
            output = output + (F.group_norm(residual, x.shape[1]) if normed else residual.to(x.dtype))
        return F.leaky_relu(output, 0.01, inplace=True)


@functools.cache
def best_norm() -> Callable[..., torch.Tensor]:
    """Return the fused kernel where it runs, else torch's."""
    if importlib.util.find_spec("triton") is None or not (device().type == "cuda" or "TRITON_INTERPRET" in os.environ):
        return plain_norm
    from tools.studies.fused_norm import fused_norm

    return fused_norm


class FusedResBlock(nn.Module):
    """MONAI's `UnetResBlock`, or what `FoldedUpBlock` does, with norm, residual and activation in one."""

    def __init__(self, block: UnetResBlock | FoldedUpBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, skip: Any = None) -> torch.Tensor:
        norm, block = best_norm(), self.block
        if isinstance(block, FoldedUpBlock):
            inner = block.conv_block
            output = norm(block._convolve(x, skip, inner.conv1.conv))
            return norm(inner.conv2(output), block._convolve(x, skip, inner.conv3.conv), True)
        output = norm(block.conv1(x))
        return norm(block.conv2(output), block.conv3(x) if block.downsample else x, block.downsample)


def fuse_norms(network: nn.Module) -> nn.Module:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, UnetResBlock | FoldedUpBlock) and not isinstance(parent, FoldedUpBlock):
                setattr(parent, name, FusedResBlock(child))
    return network


# Candidates: attention and windows


def heads_and_bias(attention: Any, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return queries, keys, values (windows, heads, n, channels) and what is added to the scores."""
    b, n, c = x.shape
    heads = attention.num_heads
    q, k, v = attention.qkv(x).view(b, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind()
    index = attention.relative_position_index[:n, :n].reshape(-1)
    bias = attention.relative_position_bias_table[index].view(n, n, heads).permute(2, 0, 1)[None].to(q.dtype)
    if mask is not None:
        bias = (bias + mask[:, None].to(q.dtype)).repeat(b // len(mask), 1, 1, 1)
    return q, k, v, bias


def attend(self: Any, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`WindowAttention.forward` by torch's one kernel."""
    q, k, v, bias = heads_and_bias(self, x, mask)
    bias = bias.expand(len(q), -1, -1, -1)
    output = F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale)
    return self.proj(output.transpose(1, 2).reshape(x.shape))


def attend_in_half(self: Any, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`WindowAttention.forward` whose scores are never in single precision, except within softmax's kernel."""
    q, k, v, bias = heads_and_bias(self, x, mask)
    with torch.autocast(x.device.type, enabled=False):
        output = (q * self.scale @ k.transpose(-2, -1) + bias).softmax(-1) @ v
    return self.proj(output.transpose(1, 2).reshape(x.shape))


@functools.cache
def window_tables(dims: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], on: torch.device) -> Any:
    """Return where each place in padded, rolled, cut windows is in the volume (-1: in the padding), and the inverse."""
    number = torch.arange(math.prod(dims), device=on).view(dims)
    number = F.pad(
        number, [side for d, w in zip(dims[::-1], window[::-1], strict=True) for side in (0, -d % w)], value=-1
    )
    there = window_partition(number.roll([-s for s in shift], (0, 1, 2))[None, ..., None], window).flatten()
    back = torch.empty(math.prod(dims), dtype=torch.long, device=on)
    inside = there >= 0
    back[there[inside]] = torch.arange(len(there), device=on)[inside]
    return (there.clamp(min=0), ~inside[:, None]), (back, None)


class Gather(torch.autograd.Function):
    """Take rows of (B, N, C) by a table that takes each row once at most, 0 where it says so."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, table: tuple, inverse: tuple) -> torch.Tensor:
        ctx.tables = table, inverse
        output = x.index_select(1, table[0])
        return output if table[1] is None else output.masked_fill_(table[1], 0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        table, inverse = ctx.tables
        return Gather.apply(gradient.contiguous(), inverse, table), None, None


def gather_windows(self: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`SwinTransformerBlock.forward_part1`: norm, pad, roll, cut, attend, and all back."""
    b, *dims, c = x.shape
    window, shift = get_window_size(dims, self.window_size, self.shift_size)
    there, back = window_tables(tuple(dims), tuple(window), tuple(shift), x.device)
    windows = Gather.apply(self.norm1(x).reshape(b, -1, c), there, back).reshape(-1, math.prod(window), c)
    windows = self.attn(windows, mask=mask if any(shift) else None)
    return Gather.apply(windows.reshape(b, -1, c), back, there).view(x.shape)


def change_forward(network: nn.Module, kind: type, name: str, forward: Callable) -> nn.Module:
    for module in network.modules():
        if isinstance(module, kind):
            setattr(module, name, types.MethodType(forward, module))
    return network


# Candidates: casts


class Halves(torch.autograd.Function):
    """All weights in half precision by one kernel, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple:
        halves = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(halves, weights)
        return tuple(halves)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        whole = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
        torch._foreach_copy_(whole, list(gradients))
        return None, *whole


class CastOnce(nn.Module):
    """A network whose convolutions and matrix products get weights that are cast together."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        kinds = nn.Conv3d | nn.ConvTranspose3d | nn.Linear
        self.names = [
            f"{name}.{key}"
            for name, module in network.named_modules()
            if isinstance(module, kinds)
            for key, _ in module.named_parameters()
        ]

    def forward(self, image: torch.Tensor) -> Any:
        weights = dict(self.network.named_parameters())
        halves = Halves.apply(halved(), *(weights[name] for name in self.names))
        return functional_call(self.network, dict(zip(self.names, halves, strict=True)), image)


# Parts


def compiled(network: nn.Module, **kwargs: Any) -> Any:
    """Compile as `SupervisedTrainer(compile=True, compile_kwargs=kwargs)` does, with torch's own random numbers."""
    torch._inductor.config.fallback_random = True
    return torch.compile(network, **kwargs)


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "triton": fuse_norms,
    "sdpa": lambda network: change_forward(network, WindowAttention, "forward", attend),
    "half_scores": lambda network: change_forward(network, WindowAttention, "forward", attend_in_half),
    "gather": lambda network: change_forward(network, SwinTransformerBlock, "forward_part1", gather_windows),
    "channels_last": lambda network: network.to(memory_format=torch.channels_last_3d),  # type: ignore[call-overload]
    "cast": CastOnce,
    "processes": lambda network: DistributedDataParallel(network, static_graph=True),
    "compile:cudagraphs": lambda network: compiled(network, backend="cudagraphs"),
    "compile:reduce-overhead": lambda network: compiled(network, mode="reduce-overhead"),
}


class Step:
    """A training step of the network with some changes, on a batch of noise."""

    def __init__(self, parts: frozenset[str], batch: int, settings: dict[str, Any], half: bool = True) -> None:
        removed = {part[1:] for part in parts if part[0] == "-"}
        self.network = make_network(DEFAULT - removed, settings).train()
        for part, change in CHANGES.items():
            if part in parts:
                self.network = change(self.network)
        self.half = half and device().type == "cuda"
        compiled = any(part.startswith("compile") for part in parts)
        self.inferer = CUDAGraphInferer() if half and not compiled else SimpleInferer()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, fused=device().type == "cuda")
        self.loss = DisruptiveLoss()
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(batch, 1, *settings["patch_size"], generator=generator).to(device())
        self.target = {"image": image, "modality": torch.arange(batch, device=device())}

    def forward(self) -> Any:
        with torch.autocast(device().type, torch.bfloat16, enabled=self.half):
            return self.inferer(self.target["image"], self.network)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.forward(), self.target).backward()
        self.optimizer.step()

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return, with the same masks each time, the output and all gradients in one vector."""
        torch.manual_seed(1)
        self.optimizer.zero_grad()
        prediction = self.forward()
        self.loss(prediction, self.target).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.network.parameters()]
        return prediction[0].detach().float().cpu(), torch.cat([g.flatten().cpu() for g in gradients])


@functools.cache
def reference(batch: int, settings: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results of the bundle's network in single precision, without TF32."""
    torch.backends.cudnn.allow_tf32 = False
    try:
        return Step(frozenset(), batch, json.loads(settings), half=False).results()
    finally:
        torch.backends.cudnn.allow_tf32 = True


@functools.cache
def own_errors(batch: int, settings: str) -> list[float]:
    """Return the errors of the step itself, as it comes."""
    step = Step(frozenset(), batch, json.loads(settings))
    step.inferer = SimpleInferer()
    return [relative_error(*pair) for pair in zip(step.results(), reference(batch, settings), strict=True)]


def relative_error(found: Any, expected: Any) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def candidate(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Check and time a step."""
    parts, batch, predicted = CANDIDATES[name]
    if "processes" in parts:
        store = Path(tempfile.mkdtemp()) / "rendezvous"
        backend = "nccl" if device().type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    torch.backends.cudnn.benchmark = "benchmark" in parts
    expected = reference(batch, json.dumps(settings))
    own = own_errors(batch, json.dumps(settings))
    tidy()
    step = Step(parts, batch, settings)
    found: list[torch.Tensor] = []
    begin = seconds(lambda: found.extend(step.results()))["seconds"]
    again = step.results()
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    rounds = 3 if device().type == "cuda" else 1
    repeat(step, rounds - 1)
    times = [seconds(lambda: repeat(step, settings["steps"]))["seconds"] for _ in range(rounds)]
    if "processes" in parts:
        dist.destroy_process_group()
    milliseconds = 1000 * statistics.median(times) / settings["steps"]
    return {
        "ms": milliseconds,
        "predicted_ms": predicted,
        "patches_per_second": 1000 * batch / milliseconds,
        "spread": (max(times) - min(times)) / min(times),
        "output_error": errors[0],
        "gradient_error": errors[1],
        "own_errors": own,
        "right": all(error <= max(TOLERANCE[0] * mine, TOLERANCE[1]) for error, mine in zip(errors, own, strict=True)),
        "repeats_to_the_bit": all(torch.equal(*pair) for pair in zip(found, again, strict=True)),
        "first_step_seconds": begin,
        "peak_mb": peak_mb(),
    }


def ceilings(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure what the device can do: bandwidth (bytes read and written), products and convolutions of bfloat16."""
    gpu = device().type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    size = 8192 if gpu else 512
    channels = 48 if gpu else 4
    big = torch.rand(2**29 if gpu else 2**22, device=device())
    other, matrix = torch.empty_like(big), torch.randn(size, size, device=device(), dtype=dtype)
    found: dict[str, float] = {"GB/s": 2 * big.nbytes / best(lambda: other.copy_(big)) / 1e9}
    found["TFLOP/s"] = 2 * size**3 / best(lambda: matrix @ matrix) / 1e12
    for form in (torch.contiguous_format, torch.channels_last_3d):
        image = torch.randn(1, channels, *settings["patch_size"], device=device(), dtype=dtype)
        image = image.contiguous(memory_format=form).requires_grad_()
        conv = nn.Conv3d(channels, channels, 3, padding=1, bias=False).to(device(), dtype)
        conv.weight.data = conv.weight.data.contiguous(memory_format=form)
        gradient = torch.randn_like(image)
        work = functools.partial(lambda conv, image, gradient: conv(image).backward(gradient), conv, image, gradient)
        products = 3 * 27 * channels**2 * math.prod(settings["patch_size"])
        found[f"TFLOP/s of convolutions, {str(form).removeprefix('torch.')}"] = 2 * products / best(work) / 1e12
    return found


def best(work: Callable[[], object]) -> float:
    """Return the median seconds of some work, which runs several times at a stretch."""
    seconds(work)
    return statistics.median(seconds(functools.partial(repeat, work, 5))["seconds"] / 5 for _ in range(5))


def repeat(work: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        work()


class Count(TorchDispatchMode):
    """Counts for each operator the calls, the bytes of all it reads and writes, and the operations of its products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **kwargs or {})
        if not function.is_view and "empty" not in function.__name__:
            tensors = [x for x in tree_leaves((args, kwargs, output)) if isinstance(x, torch.Tensor)]
            entry = self.found[family(function.__name__)]
            entry["calls"] += 1
            entry["bytes"] += sum(x.nbytes for x in tensors)
            if count := flop_registry.get(function._overloadpacket):
                entry["operations"] += count(*args, **kwargs or {}, out_val=output)
        return output


def family(name: str) -> str:
    return next((key for key, pattern in FAMILIES.items() if re.search(pattern, name)), "elementwise, sums, other")


def profiled(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the step's time by families of operators, each with its floor, and the kernels of a replayed step.

    The families are of a step as it comes: the same kernels as replayed, and torch knows what launched them.
    """
    gpu, card = device().type == "cuda", ceilings(settings)
    step = Step(frozenset(), 1, settings)
    replayed, step.inferer = step.inferer, SimpleInferer()
    step()
    with Count() as count:
        step()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=kinds) as profiler:
        seconds(step)
    taken: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU and event.key.startswith("aten::"):
            taken[family(event.key)] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1000
    families = {}
    for name in sorted(taken, key=lambda name: -taken[name]):
        entry = count.found[name]
        floor = max(entry["bytes"] / card["GB/s"] / 1e6, entry["operations"] / card["TFLOP/s"] / 1e9)
        families[name] = {"ms": taken[name], "floor_ms": floor, **entry}
    result = {"families": families, "card": card}
    if gpu:
        step.inferer = replayed
        repeat(step, 3)
        with profile(activities=kinds) as profiler:
            seconds(lambda: repeat(step, 3))
        events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
        kernels = {event.key[:120]: [event.count / 3, event.self_device_time_total / 3000] for event in events}
        result["kernels"] = dict(sorted(kernels.items(), key=lambda item: -item[1][1])[:50])
        result["kernels_ms"] = sum(time for _, time in kernels.values())
    return result


def iteration(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the milliseconds of each part of a training's iteration, each waited for."""
    step = Step(frozenset(), 1, settings)
    step()
    disrupt, image = Disrupt(), step.target["image"]
    pinned = image.cpu().pin_memory() if device().type == "cuda" else image.cpu()
    losses = torch.rand(3, device=device())
    work: dict[str, Callable[[], Any]] = {
        "a batch to the device": lambda: pinned.to(device()),
        "disruption": lambda: disrupt(image[0]),
        "gradients to None": step.optimizer.zero_grad,
        "forward, loss, backward": lambda: step.loss(step.forward(), step.target).backward(),
        "optimizer": step.optimizer.step,
        "are the weights finite": lambda: bool(torch.isfinite(get_total_norm(step.network.parameters()))),
        "three losses to the log": lambda: [loss.item() for loss in losses],
    }
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(settings["steps"]):
        for name, each in work.items():
            taken[name].append(1000 * seconds(each)["seconds"])
    return {"ms_of": {name: statistics.median(times) for name, times in taken.items()}}


PARTS: dict[str, Callable[..., dict[str, Any]]] = {"what the card can do": ceilings}
for _name in CANDIDATES:
    PARTS[_name] = functools.partial(candidate, _name)
    if _name == STEP:
        PARTS |= {"profile": profiled, "an iteration": iteration}


def tidy() -> None:
    """Give memory back, so that a peak is a part's own."""
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def work_off(connection: Connection, settings: dict[str, Any]) -> None:
    """Answer names of parts with their results, until there are no more."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = True
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            name = connection.recv()
            tidy()
            try:
                result = PARTS[name](settings)
            except Exception as error:
                result = {"failed": f"{type(error).__name__}: {error}"[:2000]}
            connection.send(result)


class Worker:
    """A process that works parts off, and another in its place where one did not end well."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.process: Any = None

    def __call__(self, name: str, patience: float) -> dict[str, Any]:
        if self.process is None:
            context = get_context("forkserver")  # a server that has imported what takes seconds
            context.set_forkserver_preload(["tools.studies.speed", "torch._inductor.config"])
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=work_off, args=(theirs, self.settings), daemon=True)
            self.process.start()
            theirs.close()
            self.connection.poll(120) and self.connection.recv()
        try:
            self.connection.send(name)
            result = (
                self.connection.recv() if self.connection.poll(patience) else {"failed": f"not in {patience:.0f} s"}
            )
        except (EOFError, OSError):
            result = {"failed": "the process died"}
        if "failed" in result:  # an error of a kernel leaves a process that can't go on
            self.end()
        return result

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def table(results: list[dict[str, Any]]) -> str:
    """Return what was found as Markdown."""
    found = {result["part"]: result for result in results}
    rows = [["step", "ms", "predicted", "output error", "gradient error", "peak MB", "first step, s"]]
    parts = []
    for name, result in found.items():
        if "failed" in result:
            rows.append([name, result["failed"].splitlines()[0][:80], *[""] * 5])
        elif "ms" in result:
            keys = ("output_error", "gradient_error", "peak_mb", "first_step_seconds")
            wrong = "" if result["right"] else " WRONG"
            rows.append(
                [
                    name,
                    f"{result['ms']:.1f}{wrong}",
                    str(result["predicted_ms"]),
                    *(f"{result[key]:.3g}" for key in keys),
                ]
            )
        elif "families" in result:
            lines = [[key, *(f"{each[k]:.3g}" for k in ("ms", "floor_ms"))] for key, each in result["families"].items()]
            parts.append(markdown_table([["operators of a step", "ms", "floor, ms"], *lines]))
        else:
            values = result.get("ms_of", result)
            lines = [[key, f"{value:.3g}"] for key, value in values.items() if isinstance(value, float)]
            parts.append(markdown_table([[name, ""], *lines]))
    return "\n\n".join([*parts, markdown_table(rows)])


def run(options: argparse.Namespace) -> None:
    """Work the parts off, as far as there is time, and write and print what was found."""
    check_patch_size(options.patch_size)
    names = [name for name in PARTS if not options.only or name in options.only]
    if unknown := set(options.only) - set(PARTS):
        raise BadInput(f"There is no part {', '.join(sorted(unknown))}; there are: {'; '.join(PARTS)}.")
    end = time.monotonic() + 60 * options.minutes
    settings = {name: getattr(options, name) for name in ("feature_size", "patch_size", "steps")}
    options.out.mkdir(parents=True, exist_ok=True)
    worker, results = Worker(settings), []
    for name in names:
        left = end - time.monotonic()
        patience = min(left, max(options.patience, PATIENCE.get(name, 0)))
        result = worker(name, patience) if left > 0 else {"failed": "no time was left"}
        results.append({"part": name, **result, "torch": torch.__version__})
        with (options.out / "gpu_step.jsonl").open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        (options.out / "gpu_step.md").write_text(table(results) + "\n")
        brief = {key: value for key, value in result.items() if not isinstance(value, dict)}
        print(f"{name}: {json.dumps(brief)}", file=sys.stderr, flush=True)
    worker.end()
    print(table(results))


def arguments(add: Callable) -> None:
    add("out", metavar="OUT", type=Path, help="folder to write to; results are added to those there")
    add("--minutes", type=float, default=5, metavar="N", help="after which nothing more is measured (%(default)s)")
    add("--patience", type=float, default=60, metavar="N", help="seconds for each part (%(default)s; on a CPU more)")
    add("--feature_size", type=int, default=48, metavar="N", help="of the network (%(default)s)")
    add("--patch_size", type=int, nargs=3, default=[96] * 3, metavar="N", help="in voxels (96 96 96)")
    add("--steps", type=int, default=10, metavar="N", help="timed together, three times (%(default)s)")
    add("--only", nargs="+", default=[], metavar="PART", help="names of parts, quoted")


main = tool("studies.gpu_step", __doc__, arguments, run, stopped="what was measured is in OUT")

if __name__ == "__main__":
    sys.exit(main())
