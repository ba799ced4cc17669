"""Outlook attention as a torch custom op: C++ on the CPU where it was built, Triton on CUDA, else the reference.

The op is `torch.ops.tokenmix.outlook_attention`; its gradients are an op as well, which computes the weights again.
Neither holds the values of windows: every pixel collects from the windows that cover it.
Source: VOLO (Yuan et al. 2021), section 3.1.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from tokenmix.blocks.kernels.outlook_attention import outlook_attention as reference
from tokenmix.fast.arguments import DTYPES, exact, integers, pointers
from tokenmix.fast.cases import Case
from tokenmix.fast.native import library, missing

__all__ = ["cases", "outlook_attention", "reference", "status"]

_NATIVE = library()
_TRITON = importlib.util.find_spec("triton") is not None

# Below so many multiply-adds one thread is faster than several.
_SMALL = 2**16


def status() -> dict[str, tuple[str, str]]:
    """Device -> (which implementation runs there, why not a faster one)."""
    return {
        "cpu": ("C++", "") if _NATIVE else ("unfold and fold", missing()),
        "cuda": ("Triton", "") if _TRITON else ("unfold and fold", "triton is not installed"),
    }


def cases(batch: int) -> Iterator[Case]:
    """The grids of patches of EMSNet-Tiny at 224x224."""
    for side, channels, heads in ((14, 16, 1), (7, 24, 1), (4, 32, 1), (2, 64, 2)):
        logits = torch.randn(batch, -(-side // 2), -(-side // 2), heads * 3**4)
        v = torch.randn(batch, side, side, channels)
        fast, plain = (partial(f, heads=heads, kernel=3, stride=2) for f in (outlook_attention, reference))
        yield Case(f"{batch}x{side}x{side}x{channels}, {heads} heads", (logits, v), fast, plain)


@torch.library.custom_op("tokenmix::outlook_attention", mutates_args=())
def _attend(logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int) -> Tensor:
    """The reference, on devices without a kernel of their own."""
    return _reference_forward(logits, v, heads, kernel, stride)


@torch.library.custom_op("tokenmix::outlook_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int
) -> tuple[Tensor, Tensor]:
    return _reference_backward(grad, logits, v, heads, kernel, stride)


def _reference_forward(logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int) -> Tensor:
    dtype = exact(logits, v)
    return reference(logits.to(dtype), v.to(dtype), heads, kernel, stride).to(v.dtype).contiguous()


def _reference_backward(
    grad: Tensor, logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int
) -> tuple[Tensor, Tensor]:
    # With W = softmax(A), Y = fold(W V) and dP = unfold(dY): dA = W (dP V^T - sum over j of W dP V^T) and
    # dV = fold(W^T dP). Written out, since autograd does not work below the dispatcher's own.
    size, dtype = kernel * kernel, exact(logits, v)
    weights = F.softmax(logits.to(dtype).unflatten(-1, (heads, size, size)), dim=-1)

    def windows(x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, h, w, heads, k*k, d)
        x = F.pad(x.to(dtype), (0, 0, *4 * (kernel // 2,)))
        x = x.unfold(1, kernel, stride).unfold(2, kernel, stride).flatten(-2)
        return x.unflatten(3, (heads, -1)).transpose(-2, -1)

    values, grads = windows(v), windows(grad)
    slopes = weights * (grads @ values.transpose(-2, -1))
    slopes = slopes - weights * slopes.sum(-1, keepdim=True)
    x = (weights.transpose(-2, -1) @ grads).permute(0, 3, 5, 4, 1, 2).flatten(1, 3).flatten(2)
    dv = F.fold(x, v.shape[1:3], kernel, padding=kernel // 2, stride=stride).permute(0, 2, 3, 1)
    return slopes.flatten(3).to(logits.dtype), dv.to(v.dtype).contiguous()


@_attend.register_fake
def _(logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int) -> Tensor:
    return v.new_empty(v.shape)


@_attend_backward.register_fake
def _(grad: Tensor, logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), v.new_empty(v.shape)


def _keep(ctx, inputs, output) -> None:
    logits, v, *ctx.sizes = inputs
    ctx.save_for_backward(logits, v)


def _grads(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return (*_attend_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None)


_attend.register_autograd(_grads, setup_context=_keep)


@register_flop_formula(torch.ops.tokenmix.outlook_attention)
def _flops(logits_shape, v_shape, heads, kernel, stride, *args, out_shape=None, **kwargs) -> int:
    """torch counts two FLOPs per multiply-add; every place of a window is a sum over all of its places."""
    batch, rows, columns, _ = logits_shape
    return 2 * batch * rows * columns * kernel**4 * v_shape[-1]


# C++


def _sizes(v: Tensor, heads: int, kernel: int, stride: int) -> list:
    threads = torch.get_num_threads() if v.numel() * kernel**2 >= _SMALL else 1
    return [*integers(*v.shape, heads, kernel, stride), threads]


def _native_forward(logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int) -> Tensor:
    assert _NATIVE is not None
    dtype = exact(logits, v)
    a, b = logits.to(dtype).contiguous(), v.to(dtype).contiguous()
    y = torch.empty_like(b)
    if y.numel():
        run = getattr(_NATIVE, f"outlook_attention_forward_{DTYPES[dtype]}")
        run(*pointers(a, b, y), *_sizes(v, heads, kernel, stride))
    return y.to(v.dtype)


def _native_backward(
    grad: Tensor, logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int
) -> tuple[Tensor, Tensor]:
    assert _NATIVE is not None
    dtype = exact(logits, v)
    a, b, g = logits.to(dtype).contiguous(), v.to(dtype).contiguous(), grad.to(dtype).contiguous()
    weights, grad_logits, grad_v = torch.empty_like(a), torch.empty_like(a), torch.empty_like(b)
    if g.numel():
        run = getattr(_NATIVE, f"outlook_attention_backward_{DTYPES[dtype]}")
        run(*pointers(a, b, g, weights, grad_logits, grad_v), *_sizes(v, heads, kernel, stride))
    elif a.numel():
        grad_logits.zero_()
    return grad_logits.to(logits.dtype), grad_v.to(v.dtype)


# Triton


def _suits_triton(logits: Tensor, v: Tensor) -> bool:
    """Its kernels compute in float32 and count the elements within one image in 32 bits."""
    return exact(logits, v) == torch.float32 and max(math.prod(t.shape[1:]) for t in (logits, v)) < 2**31


def _triton_forward(logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int) -> Tensor:
    from tokenmix.fast import outlook_attention_triton

    if not _suits_triton(logits, v):
        return _reference_forward(logits, v, heads, kernel, stride)
    return outlook_attention_triton.forward(logits, v, heads, kernel, stride)


def _triton_backward(
    grad: Tensor, logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int
) -> tuple[Tensor, Tensor]:
    from tokenmix.fast import outlook_attention_triton

    if not _suits_triton(logits, v):
        return _reference_backward(grad, logits, v, heads, kernel, stride)
    return outlook_attention_triton.backward(grad, logits, v, heads, kernel, stride)


# What runs where, settled once


if _NATIVE is not None:
    _attend.register_kernel("cpu")(_native_forward)
    _attend_backward.register_kernel("cpu")(_native_backward)

if _TRITON:
    _attend.register_kernel("cuda")(_triton_forward)
    _attend_backward.register_kernel("cuda")(_triton_backward)

# Where no device has a kernel, the reference itself: autograd goes through it without computing it a second time.
outlook_attention = _attend if _NATIVE is not None or (_TRITON and torch.cuda.is_available()) else reference
