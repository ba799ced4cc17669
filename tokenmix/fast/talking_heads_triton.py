"""Talking-heads attention in Triton, forward and backward.

A program has a tile of queries and goes over tiles of keys. A softmax over inner heads needs the scores of all heads at
once, so a tile is (heads, queries, keys), and heads are mixed by products with the small maps. It goes over the keys
twice: for the largest logit and the sum of every query and inner head, and for the values. The backward pass computes
the weights again, once for tiles of queries and once for tiles of keys, so that nothing is added atomically; gradients
of the maps are summed from one part per program. Memory holds two numbers per query and inner head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["backward", "fits", "forward"]


@triton.jit
def _heads(x, tokens, count, row, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """(heads, tokens, channels) of some tokens; zero beyond each."""
    head, channel = tl.arange(0, BLOCK_H)[:, None, None], tl.arange(0, BLOCK_D)[None, None, :]
    mask = (head < H) & (tokens < count)[None, :, None] & (channel < D)
    at = tokens.to(tl.int64)[None, :, None] * row + head * D + channel
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(
    x, value, tokens, count, row, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr
):
    head, channel = tl.arange(0, BLOCK_H)[:, None, None], tl.arange(0, BLOCK_D)[None, None, :]
    mask = (head < H) & (tokens < count)[None, :, None] & (channel < D)
    at = tokens.to(tl.int64)[None, :, None] * row + head * D + channel
    tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _matrix(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row, column = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    return tl.load(x + row * COLUMNS + column, mask=(row < ROWS) & (column < COLUMNS), other=0.0).to(tl.float32)


@triton.jit
def _vector(x, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.load(x + i, mask=i < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _mixed(matrix, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    """A matrix times (columns, N, M), at every pair."""
    product = tl.dot(matrix, tl.reshape(x, (COLUMNS, N * M)), input_precision="ieee")
    return tl.reshape(product, (ROWS, N, M))


@triton.jit
def _pairs(a, b):
    """a b^T head by head."""
    return tl.dot(a, tl.permute(b, (0, 2, 1)), input_precision="ieee")


@triton.jit
def _logits(scores, to_logits, bias, keys, M, G: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr):
    logits = _mixed(to_logits, scores, G, H, BN, BM) + bias[:, None, None]
    return tl.where((keys < M)[None, None, :], logits, float("-inf"))


@triton.jit
def _level(
    a, k, row, to_logits, bias, M, H: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The logarithm of every query's and inner head's sum: weights are exp(logits - level)."""
    most = tl.full((BG, BN), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BG, BN), dtype=tl.float32)
    for first in range(0, M, BM):
        keys = first + tl.arange(0, BM)
        b = _heads(k, keys, M, row, H, D, BH, BD)
        logits = _logits(_pairs(a, b), to_logits, bias, keys, M, BG, BH, BN, BM)
        larger = tl.maximum(most, tl.max(logits, 2))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(logits - larger[:, :, None]), 2)
        most = larger
    return most + tl.log(total)


@triton.jit
def _forward(
    q, k, v, logit_mixing, logit_bias, weight_mixing, weight_bias, y, N, M, q_0, q_1, k_0, k_1, v_0, v_1,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr, SCALE: tl.constexpr, BH: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BN)
    image = tl.cast(tl.program_id(0) // tiles, tl.int64)
    queries = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    to_logits, bias = _matrix(logit_mixing, G, H, BG, BH), _vector(logit_bias, G, BG)
    to_weights, weight_shift = _matrix(weight_mixing, H, G, BH, BG), _vector(weight_bias, H, BH)
    a = _heads(q + image * q_0, queries, N, q_1, H, D, BH, BD) * SCALE
    level = _level(a, k + image * k_0, k_1, to_logits, bias, M, H, D, BH, BG, BD, BN, BM)
    value = tl.zeros((BH, BN, BE), dtype=tl.float32)
    for first in range(0, M, BM):
        keys = first + tl.arange(0, BM)
        b = _heads(k + image * k_0, keys, M, k_1, H, D, BH, BD)
        logits = _logits(_pairs(a, b), to_logits, bias, keys, M, BG, BH, BN, BM)
        inner = tl.exp(logits - level[:, :, None])
        weights = _mixed(to_weights, inner, BH, BG, BN, BM) + weight_shift[:, None, None]
        c = _heads(v + image * v_0, keys, M, v_1, H, E, BH, BE)  # zero beyond the last key
        value += tl.dot(weights, c, input_precision="ieee")
    _write(y + image * N * H * E, value, queries, N, H * E, H, E, BH, BE)


@triton.jit
def _backward_queries(
    grad, q, k, v, logit_mixing, logit_bias, weight_mixing, levels, means, grad_q, of_logits, of_weights, of_bias, N, M,
    g_0, g_1, q_0, q_1, k_0, k_1, v_0, v_1, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    SCALE: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries and parts of those of the maps; `levels` and `means` are for the keys' turn."""
    program = tl.cast(tl.program_id(0), tl.int64)
    tiles = tl.cdiv(N, BN)
    image = program // tiles
    queries = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    to_logits, bias = _matrix(logit_mixing, G, H, BG, BH), _vector(logit_bias, G, BG)
    from_weights = tl.trans(_matrix(weight_mixing, H, G, BH, BG))
    a = _heads(q + image * q_0, queries, N, q_1, H, D, BH, BD) * SCALE
    g = _heads(grad + image * g_0, queries, N, g_1, H, E, BH, BE)
    level = _level(a, k + image * k_0, k_1, to_logits, bias, M, H, D, BH, BG, BD, BN, BM)
    mean = tl.zeros((BG, BN), dtype=tl.float32)
    weights_sum = tl.zeros((BH, BG), dtype=tl.float32)
    bias_sum = tl.zeros((BH,), dtype=tl.float32)
    for first in range(0, M, BM):
        keys = first + tl.arange(0, BM)
        b = _heads(k + image * k_0, keys, M, k_1, H, D, BH, BD)
        c = _heads(v + image * v_0, keys, M, v_1, H, E, BH, BE)
        scores = _pairs(a, b)
        inner = tl.exp(_logits(scores, to_logits, bias, keys, M, BG, BH, BN, BM) - level[:, :, None])
        slopes = _pairs(g, c)  # of the weights
        turned = tl.trans(tl.reshape(inner, (BG, BN * BM)))
        weights_sum += tl.dot(tl.reshape(slopes, (BH, BN * BM)), turned, input_precision="ieee")
        bias_sum += tl.sum(tl.sum(slopes, 2), 1)
        mean += tl.sum(inner * _mixed(from_weights, slopes, BG, BH, BN, BM), 2)
    logits_sum = tl.zeros((BG, BH), dtype=tl.float32)
    value = tl.zeros((BH, BN, BD), dtype=tl.float32)
    for first in range(0, M, BM):
        keys = first + tl.arange(0, BM)
        b = _heads(k + image * k_0, keys, M, k_1, H, D, BH, BD)
        c = _heads(v + image * v_0, keys, M, v_1, H, E, BH, BE)
        scores = _pairs(a, b)
        inner = tl.exp(_logits(scores, to_logits, bias, keys, M, BG, BH, BN, BM) - level[:, :, None])
        slopes = inner * (_mixed(from_weights, _pairs(g, c), BG, BH, BN, BM) - mean[:, :, None])  # of the logits
        turned = tl.trans(tl.reshape(scores, (BH, BN * BM)))
        logits_sum += tl.dot(tl.reshape(slopes, (BG, BN * BM)), turned, input_precision="ieee")
        value += tl.dot(_mixed(tl.trans(to_logits), slopes, BH, BG, BN, BM), b, input_precision="ieee")
    _write(grad_q + image * N * H * D, value * SCALE, queries, N, H * D, H, D, BH, BD)
    i, j = tl.arange(0, BG), tl.arange(0, BH)
    at, mask = (image * G + i[:, None]) * N + queries[None, :], (i < G)[:, None] & (queries < N)[None, :]
    tl.store(levels + at, level, mask=mask)
    tl.store(means + at, mean, mask=mask)
    at = program * G * H + i[:, None] * H + j[None, :]
    tl.store(of_logits + at, logits_sum, mask=(i < G)[:, None] & (j < H)[None, :])
    at = program * H * G + j[:, None] * G + i[None, :]
    tl.store(of_weights + at, weights_sum, mask=(j < H)[:, None] & (i < G)[None, :])
    tl.store(of_bias + program * H + j, bias_sum, mask=j < H)


@triton.jit
def _backward_keys(
    grad, q, k, v, logit_mixing, logit_bias, weight_mixing, weight_bias, levels, means, grad_k, grad_v, N, M, g_0, g_1,
    q_0, q_1, k_0, k_1, v_0, v_1, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    SCALE: tl.constexpr, BH: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(M, BM)
    image = tl.cast(tl.program_id(0) // tiles, tl.int64)
    keys = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    to_logits, bias = _matrix(logit_mixing, G, H, BG, BH), _vector(logit_bias, G, BG)
    to_weights, weight_shift = _matrix(weight_mixing, H, G, BH, BG), _vector(weight_bias, H, BH)
    b = _heads(k + image * k_0, keys, M, k_1, H, D, BH, BD)
    c = _heads(v + image * v_0, keys, M, v_1, H, E, BH, BE)
    sum_k = tl.zeros((BH, BM, BD), dtype=tl.float32)
    sum_v = tl.zeros((BH, BM, BE), dtype=tl.float32)
    i = tl.arange(0, BG)[:, None]
    for first in range(0, N, BN):
        queries = first + tl.arange(0, BN)
        a = _heads(q + image * q_0, queries, N, q_1, H, D, BH, BD) * SCALE
        g = _heads(grad + image * g_0, queries, N, g_1, H, E, BH, BE)
        at, mask = (image * G + i) * N + queries[None, :], (i < G) & (queries < N)[None, :]
        level = tl.load(levels + at, mask=mask, other=float("inf"))  # no weights beyond the last query
        mean = tl.load(means + at, mask=mask, other=0.0)
        inner = tl.exp(_logits(_pairs(a, b), to_logits, bias, keys, M, BG, BH, BN, BM) - level[:, :, None])
        weights = _mixed(to_weights, inner, BH, BG, BN, BM) + weight_shift[:, None, None]
        sum_v += tl.dot(tl.permute(weights, (0, 2, 1)), g, input_precision="ieee")
        slopes = inner * (_mixed(tl.trans(to_weights), _pairs(g, c), BG, BH, BN, BM) - mean[:, :, None])
        slopes = _mixed(tl.trans(to_logits), slopes, BH, BG, BN, BM)
        sum_k += tl.dot(tl.permute(slopes, (0, 2, 1)), a, input_precision="ieee")  # the scale is in the queries
    _write(grad_k + image * M * H * D, sum_k, keys, M, H * D, H, D, BH, BD)
    _write(grad_v + image * M * H * E, sum_v, keys, M, H * E, H, E, BH, BE)


# Tiles of queries and keys: what products of tiles are made of at least.
_TILE = 16


def _constants(q: Tensor, v: Tensor, logit_mixing: Tensor) -> dict:
    inner, heads = logit_mixing.shape
    d, e = q.shape[-1] // heads, v.shape[-1] // heads
    block_h, block_g, block_d, block_e = (max(triton.next_power_of_2(n), 16) for n in (heads, inner, d, e))
    return {
        "H": heads,
        "G": inner,
        "D": d,
        "E": e,
        "SCALE": d**-0.5,
        "BH": block_h,
        "BG": block_g,
        "BD": block_d,
        "BE": block_e,
        "BN": _TILE,
        "BM": _TILE,
        "num_warps": 8,
        "num_stages": 1,
    }


def fits(q: Tensor, v: Tensor, logit_mixing: Tensor) -> bool:
    """Whether a GPU holds the tiles of a program: many heads of many channels are too large."""
    if not q.is_cuda:
        return True
    c = _constants(q, v, logit_mixing)
    # A bound on what the compiler keeps in shared memory: operands of products, in float32.
    size = 4 * _TILE * (2 * _TILE * (c["BG"] + c["BH"]) + c["BH"] * (c["BD"] + c["BE"]))
    return size <= triton.runtime.driver.active.utils.get_device_properties(q.device.index)["max_shared_mem"]


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose channels lie side by side: thirds of a wider tensor do, and are not copied."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:2]]


def forward(q: Tensor, k: Tensor, v: Tensor, *maps: Tensor) -> Tensor:
    """As `blocks/kernels/talking_heads.py`, in float32."""
    (B, N, _), M = q.shape, k.shape[1]
    y = torch.empty(B, N, v.shape[2], dtype=v.dtype, device=q.device)
    if M == 0:
        return y.zero_()
    if y.numel():
        q, k, v = _dense(q, k, v)
        constants = _constants(q, v, maps[0])
        with torch.cuda.device_of(q):
            _forward[(B * triton.cdiv(N, _TILE),)](
                q, k, v, *(t.contiguous() for t in maps), y, N, M, *_strides(q, k, v), **constants
            )
    return y


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *maps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and in float32 of logit_mixing, weight_mixing and weight_bias."""
    (B, N, _), M = q.shape, k.shape[1]
    inner, heads = maps[0].shape
    grads = [torch.empty(t.shape, dtype=t.dtype, device=q.device) for t in (q, k, v)]
    programs = B * triton.cdiv(N, _TILE)
    parts = [
        torch.empty(programs, *shape, dtype=torch.float32, device=q.device)
        for shape in ((inner, heads), (heads, inner), (heads,))
    ]
    if B * N * M == 0:
        for t in (*grads, *parts):
            t.zero_()
    else:
        grad, q, k, v = _dense(grad, q, k, v)
        to_logits, logit_bias, to_weights, weight_bias = (t.contiguous() for t in maps)
        levels, means = torch.empty(2, B, inner, N, dtype=torch.float32, device=q.device)
        constants = _constants(q, v, to_logits)
        with torch.cuda.device_of(q):
            _backward_queries[(programs,)](
                grad, q, k, v, to_logits, logit_bias, to_weights, levels, means, grads[0], *parts, N, M,
                *_strides(grad, q, k, v), **constants,
            )  # fmt: skip
            _backward_keys[(B * triton.cdiv(M, _TILE),)](
                grad, q, k, v, to_logits, logit_bias, to_weights, weight_bias, levels, means, grads[1], grads[2], N, M,
                *_strides(grad, q, k, v), **constants,
            )  # fmt: skip
    return grads[0], grads[1], grads[2], parts[0].sum(0), parts[1].sum(0), parts[2].sum(0)
