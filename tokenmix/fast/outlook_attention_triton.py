"""Outlook attention in Triton, forward and backward.

A program handles a stretch of pixels of one image and one head. Pixels collect from the windows that cover them, so
nothing is added atomically and results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "forward"]


@triton.jit
def _cover(i, side, t, K: tl.constexpr, STRIDE: tl.constexpr):
    """Window number t, from the last, of those that cover position i along a side; i's place in it; if both exist."""
    window = (i + K // 2) // STRIDE - t
    place = i + K // 2 - window * STRIDE
    return window, place, (window >= 0) & (window * STRIDE < side) & (place < K)


@triton.jit
def _collect(
    given, x, y, H, W, columns, window_stride, image_windows, C, HEADS: tl.constexpr, D: tl.constexpr, K: tl.constexpr,
    STRIDE: tl.constexpr, TURNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pixels of y from x: with the softmax of logits, or, `TURNED`, with weights from the place read to that filled."""
    SIZE: tl.constexpr = K * K
    image, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    given += image * image_windows * window_stride + head * SIZE * SIZE
    x += image * H * W * C + head * D
    y += image * H * W * C + head * D
    pixel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    i, j = pixel // W, pixel % W
    other = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for t in tl.static_range((K + STRIDE - 1) // STRIDE):
        for u in tl.static_range((K + STRIDE - 1) // STRIDE):
            r, a, has_row = _cover(i, H, t, K, STRIDE)
            c, b, has_column = _cover(j, W, u, K, STRIDE)
            covered = has_row & has_column & (pixel < H * W)
            window = given + (r * columns + c) * window_stride
            place = a * K + b
            if not TURNED:
                mask = covered[:, None] & (other < SIZE)
                row = tl.load(window[:, None] + place[:, None] * SIZE + other, mask=mask, other=float("-inf"))
                row = row.to(tl.float32)
                most = tl.where(covered, tl.max(row, 1), 0.0)
                sums = tl.where(covered, tl.sum(tl.exp(row - most[:, None]), 1), 1.0)
            for m in range(SIZE):
                near, far = r * STRIDE - K // 2 + m // K, c * STRIDE - K // 2 + m % K
                inside = covered & (near >= 0) & (near < H) & (far >= 0) & (far < W)
                if TURNED:
                    weight = tl.load(window + m * SIZE + place, mask=inside, other=0.0).to(tl.float32)
                else:
                    logit = tl.load(window + place * SIZE + m, mask=inside, other=0.0).to(tl.float32)
                    weight = tl.exp(logit - most) / sums
                read = inside[:, None] & (channel < D)
                value = tl.load(x + (near * W + far)[:, None] * C + channel, mask=read, other=0.0)
                total += weight[:, None] * value.to(tl.float32)
    mask = (pixel < H * W)[:, None] & (channel < D)
    tl.store(y + pixel[:, None] * C + channel, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _slopes(
    logits, v, grad, weights, grad_logits, H, W, columns, windows, C, HEADS: tl.constexpr, D: tl.constexpr,
    K: tl.constexpr, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of every window: weights of attention, and the gradient of the logits."""
    SIZE: tl.constexpr = K * K
    image, head, place = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS, tl.program_id(2)
    window = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    top, left = window // columns * STRIDE - K // 2, window % columns * STRIDE - K // 2
    other = tl.arange(0, BLOCK_K)[None, :]
    mask = (window < windows)[:, None] & (other < SIZE)
    at = ((image * windows + window[:, None]) * HEADS + head) * SIZE * SIZE + place * SIZE + other
    row = tl.load(logits + at, mask=mask, other=float("-inf")).to(tl.float32)
    most = tl.where(window < windows, tl.max(row, 1), 0.0)
    weight = tl.exp(row - most[:, None])
    weight /= tl.where(window < windows, tl.sum(weight, 1), 1.0)[:, None]
    v += image * H * W * C + head * D
    grad += image * H * W * C + head * D
    i, j = top + place // K, left + place % K
    filled = (window < windows) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    slope = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for m in range(SIZE):
        near, far = top + m // K, left + m % K
        inside = filled & (near >= 0) & (near < H) & (far >= 0) & (far < W)
        product = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for first in range(0, D, BLOCK_D):
            channel = first + tl.arange(0, BLOCK_D)[None, :]
            read = inside[:, None] & (channel < D)
            value = tl.load(v + (near * W + far)[:, None] * C + channel, mask=read, other=0.0).to(tl.float32)
            flow = tl.load(grad + (i * W + j)[:, None] * C + channel, mask=read, other=0.0).to(tl.float32)
            product += tl.sum(value * flow, 1)
        slope += tl.where(other == m, product[:, None], 0.0)
    slope = weight * (slope - tl.sum(weight * slope, 1)[:, None])
    tl.store(weights + at, weight, mask=mask)
    tl.store(grad_logits + at, slope.to(grad_logits.dtype.element_ty), mask=mask)


def _blocks(kernel: int, d: int) -> dict[str, int]:
    channels = min(triton.next_power_of_2(d), 64)
    row = triton.next_power_of_2(kernel * kernel)
    return {"BLOCK_N": max(2048 // max(channels, row), 16), "BLOCK_K": row, "BLOCK_D": channels}


def _collected(given: Tensor, x: Tensor, y: Tensor, heads: int, kernel: int, stride: int, turned: bool) -> Tensor:
    B, H, W, C = x.shape
    rows, columns = given.shape[1:3]
    blocks = _blocks(kernel, C // heads)
    grid = B * heads, triton.cdiv(H * W, blocks["BLOCK_N"]), triton.cdiv(C // heads, blocks["BLOCK_D"])
    if y.numel():
        sizes = H, W, columns, given.shape[3], rows * columns, C, heads, C // heads, kernel, stride
        _collect[grid](given, x, y, *sizes, TURNED=turned, **blocks)
    return y


def forward(logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int) -> Tensor:
    """As `blocks/kernels/outlook_attention.py`; computes in float32."""
    logits, v = logits.contiguous(), v.contiguous()
    return _collected(logits, v, torch.empty_like(v), heads, kernel, stride, turned=False)


def backward(grad: Tensor, logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of `forward` for logits and values."""
    grad, logits, v = grad.contiguous(), logits.contiguous(), v.contiguous()
    B, H, W, C = v.shape
    rows, columns = logits.shape[1:3]
    weights = torch.empty(logits.shape, dtype=torch.float32, device=v.device)
    grad_logits = torch.zeros_like(logits) if not v.numel() else torch.empty_like(logits)
    if v.numel():
        blocks = _blocks(kernel, C // heads)
        grid = B * heads, triton.cdiv(rows * columns, blocks["BLOCK_N"]), kernel * kernel
        sizes = H, W, columns, rows * columns, C, heads, C // heads, kernel, stride
        _slopes[grid](logits, v, grad, weights, grad_logits, *sizes, **blocks)
    return grad_logits, _collected(weights, grad, torch.empty_like(v), heads, kernel, stride, turned=True)
