"""Attention inside windows in Triton, forward and backward, also with one token more that asks in every window.

Windows are read where they lie in the channels-last map, so that none is copied out or back. A program of the forward
pass handles one head of one window, or a stretch of its queries where the window is large. In the backward pass a
program has every key and every query of its windows to itself, one window after the other: nothing is saved, nothing is
added atomically, and results do not change from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "fits", "forward"]

# Partial sums of the bias gradient: how many programs make them, and how many numbers they may hold together. Constants
# and not the device's processors, so that sums are taken in the same order on every device.
_PROGRAMS = 2048
_PARTIAL = 2**24


@triton.jit
def _tokens(window, n, rows, columns, batch_stride, row_stride, column_stride, SIDE: tl.constexpr):
    """Where the tokens n of a window begin. A map may hold more than 2**31 numbers, a third of one all the sooner."""
    image = tl.cast(window // (rows * columns), tl.int64)
    row = (window // columns % rows * SIDE + n // SIDE).to(tl.int64)
    column = (window % columns * SIDE + n % SIDE).to(tl.int64)
    return image * batch_stride + row * row_stride + column * column_stride


@triton.jit
def _read(x, tokens, n, head, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr):
    """One head of some tokens; zero beyond the window and beyond the head, where neighbours lie."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = (n < COUNT)[:, None] & (channel < D)
    return tl.load(x + tokens[:, None] + head * D + channel, mask=mask, other=0.0).to(KIND)


@triton.jit
def _write(x, value, tokens, n, head, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = (n < COUNT)[:, None] & (channel < D)
    tl.store(x + tokens[:, None] + head * D + channel, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _more(x, n, head, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr):
    """One head of the token that stands behind those of the window; zero for all others."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(x + head * D + channel + 0 * n[:, None], mask=(n == COUNT)[:, None] & (channel < D), other=0.0).to(
        KIND
    )


@triton.jit
def _write_more(x, value, n, head, COUNT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = (n == COUNT)[:, None] & (channel < D)
    tl.store(x + head * D + channel + 0 * n[:, None], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _part(window, n, rows, columns, SIDE: tl.constexpr, SHIFT: tl.constexpr):
    """Which of the four parts of a rolled map the tokens n of a window come from."""
    below = (rows > 1) & (window // columns % rows == rows - 1) & (n // SIDE >= SIDE - SHIFT)
    beside = (columns > 1) & (window % columns == columns - 1) & (n % SIDE >= SIDE - SHIFT)
    return 2 * below.to(tl.int32) + beside.to(tl.int32)


@triton.jit
def _attend(
    q, k, bias, window, head, n, m, rows, columns, b_0, b_1, b_2, HAS_BIAS: tl.constexpr, SCALE: tl.constexpr,
    COUNT: tl.constexpr, SIDE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Weights of the keys m for the queries n before they are divided by their sum, and that sum."""
    # Not the shorter mantissa that float32 is multiplied with otherwise.
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
    if HAS_BIAS:
        pair = head * b_0 + n[:, None] * b_1 + m[None, :] * b_2
        mask = (n < COUNT)[:, None] & (m < COUNT)[None, :]
        score += tl.load(bias + pair, mask=mask, other=0.0).to(tl.float32)
    if SHIFT > 0:
        own = _part(window, n, rows, columns, SIDE, SHIFT)[:, None]
        score = tl.where(own == _part(window, m, rows, columns, SIDE, SHIFT)[None, :], score, score - 100)
    score = tl.where(m[None, :] < COUNT, score, float("-inf"))
    weight = tl.exp(score - tl.max(score, 1)[:, None])
    return weight, tl.sum(weight, 1)


@triton.jit
def _forward(
    q, k, v, bias, token, y, gathered, rows, columns, q_0, q_1, q_2, k_0, k_1, k_2, v_0, v_1, v_2, b_0, b_1, b_2,
    y_0, y_1, y_2, HEADS: tl.constexpr, SIDE: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TOKEN: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Heads of a window one after the other: those of few channels share what a read brings.
    head, window = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    a = _read(q, _tokens(window, n, rows, columns, q_0, q_1, q_2, SIDE), n, head, COUNT, D, BLOCK_D, KIND)
    if HAS_TOKEN:
        a += _more(token, n, head, COUNT, D, BLOCK_D, KIND)
    b = _read(k, _tokens(window, m, rows, columns, k_0, k_1, k_2, SIDE), m, head, COUNT, D, BLOCK_D, KIND)
    weight, total = _attend(
        a, b, bias, window, head, n, m, rows, columns, b_0, b_1, b_2, HAS_BIAS, SCALE, COUNT, SIDE, SHIFT
    )  # fmt: skip
    c = _read(v, _tokens(window, m, rows, columns, v_0, v_1, v_2, SIDE), m, head, COUNT, D, BLOCK_D, KIND)
    value = tl.dot(weight.to(KIND), c, input_precision="ieee") / total[:, None]
    _write(y, value, _tokens(window, n, rows, columns, y_0, y_1, y_2, SIDE), n, head, COUNT, D, BLOCK_D)
    if HAS_TOKEN:
        _write_more(gathered + tl.cast(window, tl.int64) * HEADS * D, value, n, head, COUNT, D, BLOCK_D)


@triton.jit
def _backward(
    grad, grad_gathered, q, k, v, bias, token, grad_q, grad_k, grad_v, partial, windows, rows, columns,
    g_0, g_1, g_2, q_0, q_1, q_2, k_0, k_1, k_2, v_0, v_1, v_2, b_0, b_1, b_2, y_0, y_1, y_2, HEADS: tl.constexpr,
    SIDE: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TOKEN: tl.constexpr, KIND: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`partial` takes the gradient of the bias, a sum for every program, or that of the token, one for every window."""
    head, start = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    m = tl.arange(0, BLOCK_M)
    held = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for window in range(start, windows, tl.num_programs(0) // HEADS):
        b = _read(k, _tokens(window, m, rows, columns, k_0, k_1, k_2, SIDE), m, head, COUNT, D, BLOCK_D, KIND)
        c = _read(v, _tokens(window, m, rows, columns, v_0, v_1, v_2, SIDE), m, head, COUNT, D, BLOCK_D, KIND)
        total_k = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        total_v = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        more = tl.cast(window, tl.int64) * HEADS * D
        for first in range(0, COUNT + HAS_TOKEN, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            a = _read(q, _tokens(window, n, rows, columns, q_0, q_1, q_2, SIDE), n, head, COUNT, D, BLOCK_D, KIND)
            g = _read(grad, _tokens(window, n, rows, columns, g_0, g_1, g_2, SIDE), n, head, COUNT, D, BLOCK_D, KIND)
            if HAS_TOKEN:
                a += _more(token, n, head, COUNT, D, BLOCK_D, KIND)
                g += _more(grad_gathered + more, n, head, COUNT, D, BLOCK_D, KIND)
            weight, total = _attend(
                a, b, bias, window, head, n, m, rows, columns, b_0, b_1, b_2, HAS_BIAS, SCALE, COUNT, SIDE, SHIFT
            )  # fmt: skip
            weight = weight / total[:, None]
            total_v += tl.dot(tl.trans(weight.to(KIND)), g, input_precision="ieee")
            slope = tl.dot(g, tl.trans(c), input_precision="ieee")
            slope = weight * (slope - tl.sum(weight * slope, 1)[:, None])  # of the scores
            value = tl.dot(slope.to(KIND), b, input_precision="ieee") * SCALE
            total_k += tl.dot(tl.trans(slope.to(KIND)), a, input_precision="ieee") * SCALE
            place = _tokens(window, n, rows, columns, y_0, y_1, y_2, SIDE)
            _write(grad_q, value, place, n, head, COUNT, D, BLOCK_D)
            if HAS_TOKEN:
                _write_more(partial + more, value, n, head, COUNT, D, BLOCK_D)
            if HAS_BIAS and BLOCK_N >= COUNT:
                held += slope
            elif HAS_BIAS:
                # Too large to be held: added up in memory that no other program touches and that begins with zeros; a
                # window waits until all threads are done with the one before.
                pair = (tl.program_id(0) * COUNT + n[:, None]) * COUNT + m[None, :]
                mask = (n < COUNT)[:, None] & (m < COUNT)[None, :]
                before = tl.load(partial + pair, mask=mask, other=0.0)
                tl.store(partial + pair, before + slope, mask=mask)
                tl.debug_barrier()
        place = _tokens(window, m, rows, columns, y_0, y_1, y_2, SIDE)
        _write(grad_k, total_k, place, m, head, COUNT, D, BLOCK_D)
        _write(grad_v, total_v, place, m, head, COUNT, D, BLOCK_D)
    if HAS_BIAS and BLOCK_N >= COUNT:
        n = tl.arange(0, BLOCK_N)
        pair = (tl.program_id(0) * COUNT + n[:, None]) * COUNT + m[None, :]
        tl.store(partial + pair, held, mask=(n < COUNT)[:, None] & (m < COUNT)[None, :])


_IS_INTERPRETED = not isinstance(_forward, triton.JITFunction)


def _blocks(count: int, d: int) -> tuple[int, int, int]:
    """Queries, keys and channels at a time. Products of tiles are of 16 rows and columns at least."""
    keys = max(triton.next_power_of_2(count), 16)
    return min(keys, max(8192 // keys, 16)), keys, max(triton.next_power_of_2(d), 16)


def _constants(q: Tensor, bias: Tensor | None, token: Tensor | None, heads: int, window: int, shift: int) -> dict:
    count, d = window * window, q.shape[-1] // heads
    queries, keys, channels = _blocks(count, d)
    # Halves are multiplied as such; Triton's interpreter would take the bits of a bfloat16 for an integer.
    kinds = {} if _IS_INTERPRETED else {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return {
        "HEADS": heads,
        "SIDE": window,
        "COUNT": count,
        "D": d,
        "SCALE": d**-0.5,
        "SHIFT": shift,
        "HAS_BIAS": bias is not None,
        "HAS_TOKEN": int(token is not None),
        "KIND": kinds.get(q.dtype, tl.float32),
        "BLOCK_N": queries,
        "BLOCK_M": keys,
        "BLOCK_D": channels,
        "num_warps": min(max(keys * max(queries, channels) // 512, 1), 8),
        "num_stages": 1,  # many small programs hide each other's reads, and each takes less shared memory
    }


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose channels lie side by side: thirds of a wider tensor do, and are not copied."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if bias is None else bias.stride()[1:]


def _grid(q: Tensor, heads: int, window: int) -> tuple[int, int, int]:
    """The number of windows, and of rows and columns of windows in a map.

    Raises:
        ValueError: if windows or heads do not come out even.
    """
    B, H, W, C = q.shape
    if H % window or W % window or C % heads:
        raise ValueError(f"a map of {H} x {W} x {C} is not divided by windows of {window} and {heads} heads")
    rows, columns = H // window, W // window
    return B * rows * columns, rows, columns


def fits(q: Tensor, heads: int, window: int) -> bool:
    """Whether a GPU holds the tiles of a program of the backward pass: large windows of many channels are too large."""
    if not q.is_cuda:
        return True
    queries, keys, channels = _blocks(window * window, q.shape[-1] // heads)
    # What the compiler takes for float32: each kind of tile twice, one way and the other. Halves take no more.
    size = 2 * 4 * (queries * keys + keys * channels + queries * channels)
    device = q.device.index
    return size <= triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, token: Tensor | None, heads: int, window: int, shift: int
) -> tuple[Tensor, Tensor | None]:
    """As `blocks/kernels/window_attention.py`, with a bias or with a token (C,) that asks too; softmax in float32.

    Returns:
        The map, and what the token gathered in every window, (B, n, C).
    """
    windows, rows, columns = _grid(q, heads, window)
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    gathered = None if token is None else y.new_empty(q.shape[0], rows * columns, q.shape[3])
    if y.numel():
        q, k, v = _dense(q, k, v)
        constants = _constants(q, bias, token, heads, window, shift)
        grid = (windows * heads, triton.cdiv(window * window + constants["HAS_TOKEN"], constants["BLOCK_N"]))
        nowhere = q  # a place to point to, where there is nothing
        with torch.cuda.device_of(q):
            _forward[grid](
                q, k, v, nowhere if bias is None else bias, nowhere if token is None else token.contiguous(), y,
                nowhere if gathered is None else gathered, rows, columns, *_strides(q, k, v), *_bias_strides(bias),
                *_strides(y), **constants,
            )  # fmt: skip
    return y, gathered


def backward(
    grad: Tensor, grad_gathered: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None,
    token: Tensor | None, heads: int, window: int, shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of `forward` for q, k, v, and for the bias or the token; the last is float32."""
    windows, rows, columns = _grid(q, heads, window)
    grads = [torch.empty(q.shape, dtype=t.dtype, device=q.device) for t in (q, k, v)]
    count = window * window
    # Without a bias there is nothing to add up from window to window.
    programs = windows if bias is None else min(windows, max(min(_PROGRAMS, _PARTIAL // count**2) // heads, 1))
    constants = _constants(q, bias, token, heads, window, shift)
    partial = None
    if bias is not None:
        reserve = torch.empty if constants["BLOCK_N"] >= count else torch.zeros
        partial = reserve(programs, heads, count, count, dtype=torch.float32, device=q.device)
    elif token is not None:
        partial = torch.empty(windows, q.shape[3], dtype=torch.float32, device=q.device)
    if q.numel():
        grad, q, k, v = _dense(grad, q, k, v)
        nowhere = q  # a place to point to, where there is nothing
        with torch.cuda.device_of(q):
            _backward[(programs * heads,)](
                grad, nowhere if grad_gathered is None else grad_gathered.contiguous(), q, k, v,
                nowhere if bias is None else bias, nowhere if token is None else token.contiguous(), *grads,
                nowhere if partial is None else partial, windows, rows, columns, *_strides(grad, q, k, v),
                *_bias_strides(bias), *_strides(grads[0]), **constants,
            )  # fmt: skip
    if partial is None:
        return grads[0], grads[1], grads[2], None
    return grads[0], grads[1], grads[2], partial.sum(0, keepdim=bias is not None)
