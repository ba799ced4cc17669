"""Axial sampling in Triton, forward and backward.

One program handles a stretch of one line (a row or a column of one image) and a block of channels. The backward pass
turns the sampling round: a position of the map collects from every position of its line that reads it, with the weight
max(0, 1 - distance), so nothing is added atomically and results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]


@triton.jit
def _forward(
    x, offsets, y, lines_inner, n, step, outer, C, S: tl.constexpr, o_position, o_step, o_outer, o_inner,
    inner, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # A line is told by (image and) outer index; `inner` steps between lines that share an image row. It may begin
    # beyond 2^31 elements.
    line = tl.program_id(0).to(tl.int64)
    a, b = line // lines_inner, line % lines_inner
    base = a * outer + b * inner
    o_base = a * o_outer + b * o_inner
    position = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (position < n) & (channel < C)
    offset = tl.load(offsets + o_base + position * o_step + channel // S * o_position, mask=mask, other=0.0)
    p = offset.to(tl.float32) + position
    left = tl.floor(p)
    fraction = p - left
    k = tl.minimum(tl.maximum(left, -2.0), n + 0.0).to(tl.int32)
    near = tl.load(x + base + k * step + channel, mask=mask & (k >= 0) & (k < n), other=0.0).to(tl.float32)
    far = tl.load(x + base + (k + 1) * step + channel, mask=mask & (k >= -1) & (k < n - 1), other=0.0).to(tl.float32)
    value = near + (far - near) * fraction
    tl.store(y + base + position * step + channel, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    grad, x, offsets, grad_x, slope, lines_inner, n, step, outer, C, S: tl.constexpr, o_position, o_step, o_outer,
    o_inner, inner, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    a, b = line // lines_inner, line % lines_inner
    base = a * outer + b * inner
    o_base = a * o_outer + b * o_inner
    position = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (position < n) & (channel < C)

    # Slope of every output position in its offset, channel by channel; the caller sums the channels that share one.
    offset = tl.load(offsets + o_base + position * o_step + channel // S * o_position, mask=mask, other=0.0)
    left = tl.floor(offset.to(tl.float32) + position)
    k = tl.minimum(tl.maximum(left, -2.0), n + 0.0).to(tl.int32)
    near = tl.load(x + base + k * step + channel, mask=mask & (k >= 0) & (k < n), other=0.0).to(tl.float32)
    far = tl.load(x + base + (k + 1) * step + channel, mask=mask & (k >= -1) & (k < n - 1), other=0.0).to(tl.float32)
    g = tl.load(grad + base + position * step + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(slope + base + position * step + channel, g * (far - near), mask=mask)

    total = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    row = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    for j in range(n):
        flow = tl.load(grad + base + j * step + row, mask=row < C, other=0.0).to(tl.float32)
        o = tl.load(offsets + o_base + j * o_step + row // S * o_position, mask=row < C, other=0.0).to(tl.float32)
        distance = tl.abs((o + j)[None, :] - position)
        total += flow[None, :] * tl.maximum(1.0 - distance, 0.0)
    tl.store(grad_x + base + position * step + channel, total.to(grad_x.dtype.element_ty), mask=mask)


def _geometry(x: Tensor, offsets: Tensor, axis: str) -> tuple[tuple[int, int, int], list[int]]:
    """The grid of programs, and the sizes and strides of lines along an axis."""
    B, H, W, C = x.shape
    S = C // offsets.shape[-1]
    o = offsets.stride()
    if axis == "width":
        lines, n, step, outer, inner = H, W, C, H * W * C, W * C
        o_step, o_inner = o[2], o[1]
    else:
        lines, n, step, outer, inner = W, H, W * C, H * W * C, C
        o_step, o_inner = o[1], o[2]
    block_n, block_c = _blocks(n, C)
    grid = (B * lines, triton.cdiv(n, block_n), triton.cdiv(C, block_c))
    return grid, [lines, n, step, outer, C, S, o[3], o_step, o[0], o_inner, inner, block_n, block_c]


def _blocks(n: int, C: int) -> tuple[int, int]:
    block_c = min(triton.next_power_of_2(C), 64)
    return min(triton.next_power_of_2(n), max(1024 // block_c, 1)), block_c


def forward(x: Tensor, offsets: Tensor, axis: str) -> Tensor:
    """As `blocks/kernels/axial_sample.py`; computes in float32."""
    x = x.contiguous()
    y = torch.empty_like(x)
    grid, sizes = _geometry(x, offsets, axis)
    if y.numel():
        _forward[grid](x, offsets, y, *sizes)
    return y


def backward(grad: Tensor, x: Tensor, offsets: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """Gradients of `forward` for the map and the offsets."""
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    slope = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    grid, sizes = _geometry(x, offsets, axis)
    if x.numel():
        _backward[grid](grad, x, offsets, grad_x, slope, *sizes)
    shared = slope.unflatten(-1, (offsets.shape[-1], -1)).sum(-1)
    return grad_x, shared.to(offsets.dtype)
