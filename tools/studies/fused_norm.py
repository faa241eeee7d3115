"""Instance norm, residual and leaky ReLU as one pass over memory, in Triton: a candidate, see `gpu_step`; not in use.

torch's kernel for groups of one channel lets one block of threads add up a whole channel: 48 blocks at the published
size, on a GPU that runs several hundred at once. Here a channel is cut into chunks, each added up by its own block. The
order of the sums is fixed, so that a step can be repeated to the bit. Passes over a tensor of a block's second half
(two norms, their sum, activation; forward and backward): 15 in place of 24.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

TILE = 4096  # values that a block of threads holds at once
BLOCKS = 1024  # of threads, a few for each of a GPU's multiprocessors


@triton.jit
def _places(voxels, channels, chunk, n_stride, c_stride, WIDTH: tl.constexpr):
    """Return a program's first voxel and that after its last, which of its channels there are, where they begin in
    memory, and their numbers over the batch."""
    groups = tl.cdiv(channels, WIDTH)
    sample = tl.program_id(0) // groups
    channel = tl.program_id(0) % groups * WIDTH + tl.arange(0, WIDTH)
    begin = sample.to(tl.int64) * n_stride + channel * c_stride
    first = tl.program_id(1) * chunk
    return first, tl.minimum(first + chunk, voxels), channel < channels, begin, sample * channels + channel


@triton.jit
def _load(x, begin, inside, voxel, last, s_stride):
    """Return values (voxels, channels) in float32, 0 outside, where they are, and which of them are inside."""
    where = begin[None, :] + voxel[:, None].to(tl.int64) * s_stride
    mask = inside[None, :] & (voxel[:, None] < last)
    return tl.load(x + where, mask, 0).to(tl.float32), where, mask


@triton.jit
def _moments(x, sums, begin, inside, number, count, voxels, eps, FIRST: tl.constexpr):
    """Return mean and inverse deviation (1, channels) from the sums of differences to the first voxel, and squares."""
    difference = tl.load(sums + FIRST * count + number, inside, 0) / voxels
    square = tl.load(sums + (FIRST + 1) * count + number, inside, 0) / voxels
    mean = tl.load(x + begin, inside, 0).to(tl.float32) + difference
    return mean[None, :], (1 / tl.sqrt(square - difference * difference + eps))[None, :]


@triton.jit
def _add_up(
    x, residual, partial, count, voxels, channels, chunk, n_stride, c_stride, s_stride,
    NORMED: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, last, inside, begin, number = _places(voxels, channels, chunk, n_stride, c_stride, WIDTH)
    x_first = tl.load(x + begin, inside, 0).to(tl.float32)[None, :]
    x_sum = tl.zeros([SPAN, WIDTH], tl.float32)
    x_square, r_sum, r_square = x_sum, x_sum, x_sum
    if NORMED:
        r_first = tl.load(residual + begin, inside, 0).to(tl.float32)[None, :]
    for start in range(first, last, SPAN):
        value, _, mask = _load(x, begin, inside, start + tl.arange(0, SPAN), last, s_stride)
        value = tl.where(mask, value - x_first, 0)
        x_sum += value
        x_square += value * value
        if NORMED:
            value, _, mask = _load(residual, begin, inside, start + tl.arange(0, SPAN), last, s_stride)
            value = tl.where(mask, value - r_first, 0)
            r_sum += value
            r_square += value * value
    place, chunks = partial + number * tl.num_programs(1) + tl.program_id(1), count * tl.num_programs(1)
    tl.store(place, tl.sum(x_sum, 0), inside)
    tl.store(place + chunks, tl.sum(x_square, 0), inside)
    if NORMED:
        tl.store(place + 2 * chunks, tl.sum(r_sum, 0), inside)
        tl.store(place + 3 * chunks, tl.sum(r_square, 0), inside)


@triton.jit
def _apply(
    x, residual, y, sums, count, eps, slope, voxels, channels, chunk, n_stride, c_stride, s_stride,
    ADDED: tl.constexpr, NORMED: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, last, inside, begin, number = _places(voxels, channels, chunk, n_stride, c_stride, WIDTH)
    mean, inverse = _moments(x, sums, begin, inside, number, count, voxels, eps, 0)
    if NORMED:
        r_mean, r_inverse = _moments(residual, sums, begin, inside, number, count, voxels, eps, 2)
    for start in range(first, last, SPAN):
        voxel = start + tl.arange(0, SPAN)
        value, where, mask = _load(x, begin, inside, voxel, last, s_stride)
        value = (value - mean) * inverse
        if ADDED:
            other, _, _ = _load(residual, begin, inside, voxel, last, s_stride)
            if NORMED:
                other = (other - r_mean) * r_inverse
            value += other
        tl.store(y + where, tl.where(value > 0, value, slope * value).to(y.dtype.element_ty), mask)


@triton.jit
def _add_up_gradients(
    x, residual, y, y_gradient, sums, partial, count, eps, slope,
    voxels, channels, chunk, n_stride, c_stride, s_stride,
    NORMED: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, last, inside, begin, number = _places(voxels, channels, chunk, n_stride, c_stride, WIDTH)
    mean, inverse = _moments(x, sums, begin, inside, number, count, voxels, eps, 0)
    total = tl.zeros([SPAN, WIDTH], tl.float32)
    x_product, r_product = total, total
    if NORMED:
        r_mean, r_inverse = _moments(residual, sums, begin, inside, number, count, voxels, eps, 2)
    for start in range(first, last, SPAN):
        voxel = start + tl.arange(0, SPAN)
        gradient, _, _ = _load(y_gradient, begin, inside, voxel, last, s_stride)
        output, _, _ = _load(y, begin, inside, voxel, last, s_stride)
        gradient = tl.where(output > 0, gradient, slope * gradient)
        value, _, _ = _load(x, begin, inside, voxel, last, s_stride)
        total += gradient
        x_product += gradient * (value - mean) * inverse
        if NORMED:
            other, _, _ = _load(residual, begin, inside, voxel, last, s_stride)
            r_product += gradient * (other - r_mean) * r_inverse
    place, chunks = partial + number * tl.num_programs(1) + tl.program_id(1), count * tl.num_programs(1)
    tl.store(place, tl.sum(total, 0), inside)
    tl.store(place + chunks, tl.sum(x_product, 0), inside)
    if NORMED:
        tl.store(place + 2 * chunks, tl.sum(r_product, 0), inside)


@triton.jit
def _apply_gradients(
    x, residual, y, y_gradient, x_gradient, r_gradient, sums, gradient_sums, count, eps, slope,
    voxels, channels, chunk, n_stride, c_stride, s_stride,
    ADDED: tl.constexpr, NORMED: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first, last, inside, begin, number = _places(voxels, channels, chunk, n_stride, c_stride, WIDTH)
    mean, inverse = _moments(x, sums, begin, inside, number, count, voxels, eps, 0)
    total = (tl.load(gradient_sums + number, inside, 0) / voxels)[None, :]
    product = (tl.load(gradient_sums + count + number, inside, 0) / voxels)[None, :]
    if NORMED:
        r_mean, r_inverse = _moments(residual, sums, begin, inside, number, count, voxels, eps, 2)
        r_product = (tl.load(gradient_sums + 2 * count + number, inside, 0) / voxels)[None, :]
    for start in range(first, last, SPAN):
        voxel = start + tl.arange(0, SPAN)
        gradient, where, mask = _load(y_gradient, begin, inside, voxel, last, s_stride)
        output, _, _ = _load(y, begin, inside, voxel, last, s_stride)
        gradient = tl.where(output > 0, gradient, slope * gradient)
        value, _, _ = _load(x, begin, inside, voxel, last, s_stride)
        change = (gradient - total - (value - mean) * inverse * product) * inverse
        tl.store(x_gradient + where, change.to(x_gradient.dtype.element_ty), mask)
        if NORMED:
            other, _, _ = _load(residual, begin, inside, voxel, last, s_stride)
            gradient = (gradient - total - (other - r_mean) * r_inverse * r_product) * r_inverse
        if ADDED:
            tl.store(r_gradient + where, gradient.to(r_gradient.dtype.element_ty), mask)


def layout(x: torch.Tensor) -> torch.memory_format:
    """Return the order of a tensor's values in memory, which the kernels keep."""
    last = torch.channels_last_3d
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


def width_of(x: torch.Tensor) -> int:
    """Return how many channels a block of threads takes."""
    return min(64, triton.next_power_of_2(x.shape[1])) if layout(x) == torch.channels_last_3d else 1


def launch(kernel: Any, x: torch.Tensor, chunks: int, *args: Any, **flags: bool) -> None:
    """Run a kernel on all voxels and channels of x, whose channels are cut into so many chunks."""
    channels, voxels = x.shape[1], x[0, 0].numel()
    width, strides = width_of(x), (voxels, 1)
    if layout(x) == torch.channels_last_3d:
        strides = (1, channels)
    grid = (len(x) * triton.cdiv(channels, width), chunks)
    chunk = 16 * triton.cdiv(voxels, 16 * chunks)  # so that a thread can load 16 bytes at once
    sizes = (voxels, channels, chunk, channels * voxels, *strides)
    kernel[grid](*args, *sizes, **flags, SPAN=TILE // width, WIDTH=width, num_warps=8)


def chunks_of(x: torch.Tensor) -> int:
    """Return into how many chunks a channel is cut: into as many as fill a GPU, but none smaller than a tile."""
    width = width_of(x)
    blocks = len(x) * triton.cdiv(x.shape[1], width)
    return min(triton.cdiv(BLOCKS, blocks), triton.cdiv(x[0, 0].numel() * width, TILE))


class FusedNorm(torch.autograd.Function):
    """Leaky ReLU of the instance norm of x, plus the residual or the instance norm of it, if there is one.

    Shapes:
        x, residual and output: (B, C, D, H, W), of a half or single precision each; computed in single precision. The
        output has the type and the layout of x: contiguous, or channels last.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, residual: torch.Tensor | None, normed: bool, slope: float, eps: float
    ) -> torch.Tensor:
        form = layout(x)
        x = x.contiguous(memory_format=form)
        ctx.added = residual is not None
        residual = residual.contiguous(memory_format=form) if residual is not None else x  # a pointer that is not read
        y, count, chunks = torch.empty_like(x), x.shape[0] * x.shape[1], chunks_of(x)
        partial = torch.empty(4 if normed else 2, count, chunks, device=x.device)
        launch(_add_up, x, chunks, x, residual, partial, count, NORMED=normed)
        sums = partial.sum(-1)
        launch(_apply, x, chunks, x, residual, y, sums, count, eps, slope, ADDED=ctx.added, NORMED=normed)
        ctx.save_for_backward(x, residual, y, sums)
        ctx.options = normed, slope, eps
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        x, residual, y, sums = ctx.saved_tensors
        normed, slope, eps = ctx.options
        gradient = gradient.contiguous(memory_format=layout(x))
        x_gradient = torch.empty_like(x)
        r_gradient = torch.empty_like(residual) if ctx.added else x_gradient
        count, chunks = x.shape[0] * x.shape[1], chunks_of(x)
        partial = torch.empty(3 if normed else 2, count, chunks, device=x.device)
        tensors, numbers = (x, residual, y, gradient), (count, eps, slope)
        launch(_add_up_gradients, x, chunks, *tensors, sums, partial, *numbers, NORMED=normed)
        outputs = (x_gradient, r_gradient, sums, partial.sum(-1))
        launch(_apply_gradients, x, chunks, *tensors, *outputs, *numbers, ADDED=ctx.added, NORMED=normed)
        return x_gradient, r_gradient if ctx.added else None, None, None, None


def fused_norm(
    x: torch.Tensor, residual: torch.Tensor | None = None, normed: bool = False, slope: float = 0.01, eps: float = 1e-5
) -> torch.Tensor:
    """As `FusedNorm`."""
    return FusedNorm.apply(x, residual, normed, slope, eps)
