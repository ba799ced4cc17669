"""Softmax attention between tokens on the CPU in C++, where it was built; on GPUs torch's fused attention stays.

The op is `torch.ops.tokenmix.attention`; its gradients are an op as well. The kernel is that of window attention, with
whole images for windows: it reads thirds of a wider tensor in place, and wastes nothing where keys or channels are few.
Source: Attention is All You Need (Vaswani et al. 2017), equation 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenmix.blocks.kernels.attention import attention as reference
from tokenmix.blocks.kernels.attention import windowed_attention as windowed_reference
from tokenmix.fast.arguments import DTYPES, packed, pointers
from tokenmix.fast.cases import Case
from tokenmix.fast.native import library, missing

__all__ = ["attention", "cases", "reference", "status", "windowed_attention", "windowed_reference"]

_NATIVE = library()


def status() -> dict[str, tuple[str, str]]:
    """Device -> (which implementation runs there, why not a faster one)."""
    fused = "torch's fused attention"
    return {"cpu": ("C++", "") if _NATIVE else (fused, missing()), "cuda": (fused, "")}


def cases(batch: int) -> Iterator[Case]:
    """Fusion in MAT-3, PVTv2-B2 and DeiT-S at 224x224: queries of a map to few keys, and tokens to each other."""
    for queries, keys, heads, d in ((196, 4, 8, 18), (784, 49, 2, 64), (197, 197, 6, 64)):
        inputs = torch.randn(batch, queries, heads * d), *torch.randn(batch, keys, 2 * heads * d).chunk(2, -1)
        fast, plain = (partial(f, heads=heads) for f in (attention, reference))
        yield Case(f"{batch}x{queries}x{heads * d} to {keys}, {heads} heads", inputs, fast, plain)


@torch.library.custom_op("tokenmix::attention", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, N, C) queries to (B, M, C) keys and values."""
    return reference(q, k, v, heads).contiguous()


@torch.library.custom_op("tokenmix::attention_backward", mutates_args=())
def _attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(grad, q, k, v, heads)


def _gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    # With P = softmax(s q k^T) and dP = dO v^T: dS = P (dP - sum over keys of P dP), dv = P^T dO, dq = s dS k,
    # dk = s dS^T q. Written out, since autograd does not work below the dispatcher's own.
    scale = (q.shape[-1] // heads) ** -0.5
    q, k, v, grad = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v, grad))
    weights = ((q * scale) @ k.transpose(-2, -1)).softmax(-1)
    slopes = grad @ v.transpose(-2, -1)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdim=True))
    dq, dk, dv = slopes @ k * scale, slopes.transpose(-2, -1) @ q * scale, weights.transpose(-2, -1) @ grad
    return tuple(x.transpose(1, 2).flatten(2).contiguous() for x in (dq, dk, dv))


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return q.new_empty(q.shape)


@_attend_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output) -> None:
    q, k, v, ctx.heads = inputs
    ctx.save_for_backward(q, k, v)


def _grads(ctx, grad: Tensor) -> tuple:
    return (*_attend_backward(grad, *ctx.saved_tensors, ctx.heads), None)


_attend.register_autograd(_grads, setup_context=_keep)


@register_flop_formula(torch.ops.tokenmix.attention)
def _flops(q_shape, k_shape, v_shape, heads, *args, out_shape=None, **kwargs) -> int:
    """torch counts two FLOPs per multiply-add; there are two products of every query with all keys."""
    batch, queries, channels = q_shape
    return 4 * batch * queries * k_shape[1] * channels


# C++


def _readable(q: Tensor, k: Tensor, v: Tensor, *grad: Tensor, heads: int) -> list[Tensor]:
    """Channels side by side, in the dtype of the queries."""
    tensors = q, k, v, *grad
    B, _, C = q.shape
    if k.shape != v.shape or k.shape[::2] != (B, C) or C % heads or (grad and grad[0].shape != q.shape):
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
        raise ValueError(f"tokens of {shapes} do not attend to each other with {heads} heads")
    return [x if x.stride(2) == 1 and x.dtype is q.dtype else x.to(q.dtype).contiguous() for x in tensors]


def _numbers(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, heads: int) -> bytes:
    """As `Call` in window_attention.cpp reads them: images of one row are one window each, for queries and keys."""
    (B, N, C), M = q.shape, k.shape[1]
    strides = [stride for x in (q, k, v, grad) for stride in (x.stride(0), 0, x.stride(1))]
    return packed(B, heads, C // heads, 0, torch.get_num_threads(), 0, 0, 1, 1, 1, N, 1, M, *strides)


def _native_forward(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = _readable(q, k, v, heads=heads)
    if not k.shape[1]:
        return torch.zeros(q.shape, dtype=q.dtype)  # no keys, nothing to sum
    y = torch.empty(q.shape, dtype=q.dtype)
    if y.numel():
        run = getattr(_NATIVE, f"window_attention_forward_{DTYPES[q.dtype]}")
        run(*pointers(q, k, v, None, None, y, None), _numbers(q, k, v, y, heads))
    return y


def _native_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, grad = _readable(q, k, v, grad, heads=heads)
    reserve = torch.empty if q.numel() and k.numel() else torch.zeros
    dq, dk, dv = (reserve(x.shape, dtype=q.dtype) for x in (q, k, v))
    if q.numel() and k.numel():
        run = getattr(_NATIVE, f"window_attention_backward_{DTYPES[q.dtype]}")
        numbers = _numbers(q, k, v, grad, heads)
        run(*pointers(q, k, v, None, None, grad, None, dq, dk, dv, None, None), numbers)
    return dq, dk, dv


def _fast_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    if q.device.type != "cpu" or q.dtype not in DTYPES or q.shape[-1] != v.shape[-1]:
        return reference(q, k, v, heads)
    return _attend(q.flatten(1, -2), k.flatten(1, -2), v.flatten(1, -2), heads).view(q.shape)


def _fast_windowed_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    if q.device.type != "cpu" or q.dtype not in DTYPES or q.shape[-1] != v.shape[-1]:
        return windowed_reference(q, k, v, heads)
    return _attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), heads).view(q.shape)


# What runs where, settled once

if _NATIVE is not None:
    _attend.register_kernel("cpu")(_native_forward)
    _attend_backward.register_kernel("cpu")(_native_backward)

attention = reference if _NATIVE is None else _fast_attention
windowed_attention = windowed_reference if _NATIVE is None else _fast_windowed_attention
