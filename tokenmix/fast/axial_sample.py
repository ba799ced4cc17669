"""Axial sampling as a torch custom op: C++ on the CPU where it was built, Triton on CUDA, else the reference.

The op is `torch.ops.tokenmix.axial_sample`: it traces under `torch.compile(fullgraph=True)` with dynamic sizes and
under `torch.export`, and its gradients are an op as well.
Source: Active Token Mixer (Wei et al. 2023), section 3.2.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from tokenmix.blocks.kernels.axial_sample import axial_sample as reference
from tokenmix.fast.arguments import DTYPES, exact, integers, pointers
from tokenmix.fast.cases import Case
from tokenmix.fast.native import library, missing

__all__ = ["axial_sample", "cases", "reference", "status"]

_NATIVE = library()
_TRITON = importlib.util.find_spec("triton") is not None


def status() -> dict[str, tuple[str, str]]:
    """Device -> (which implementation runs there, why not a faster one)."""
    return {
        "cpu": ("C++", "") if _NATIVE else ("gather arithmetic", missing()),
        "cuda": ("Triton", "") if _TRITON else ("gather arithmetic", "triton is not installed"),
    }


def cases(batch: int) -> Iterator[Case]:
    """ATMNet-T's maps at 224x224, and how many channels share an offset there; offsets are half of a wider tensor."""
    for side, channels, share in ((56, 64, 2), (28, 128, 4), (14, 320, 4), (7, 512, 8)):
        x = torch.randn(batch, side, side, channels)
        both = 2 * torch.randn(batch, side, side, 2 * channels // share)
        for axis, offsets in zip(("height", "width"), both.chunk(2, -1), strict=True):
            fast, plain = (partial(f, axis=axis) for f in (axial_sample, reference))
            yield Case(f"{batch}x{side}x{side}x{channels}, {axis}", (x, offsets), fast, plain)


@torch.library.custom_op("tokenmix::axial_sample", mutates_args=())
def _sample(x: Tensor, offsets: Tensor, axis: str) -> Tensor:
    """The reference, on devices without a kernel of their own."""
    return reference(x, offsets, axis).contiguous()


@torch.library.custom_op("tokenmix::axial_sample_backward", mutates_args=())
def _sample_backward(grad: Tensor, x: Tensor, offsets: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    return _reference_backward(grad, x, offsets, axis)


def _reference_backward(grad: Tensor, x: Tensor, offsets: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        a, b = x.detach().requires_grad_(), offsets.detach().requires_grad_()
        grads = torch.autograd.grad(reference(a, b, axis), (a, b), grad)
    return grads[0].contiguous(), grads[1].contiguous()


@_sample.register_fake
def _(x: Tensor, offsets: Tensor, axis: str) -> Tensor:
    return x.new_empty(x.shape)


@_sample_backward.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), offsets.new_empty(offsets.shape)


def _keep(ctx, inputs, output) -> None:
    x, offsets, ctx.axis = inputs
    ctx.save_for_backward(x, offsets)


def _grads(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, offsets = ctx.saved_tensors
    return (*_sample_backward(grad, x, offsets, ctx.axis), None)


_sample.register_autograd(_grads, setup_context=_keep)


@register_flop_formula(torch.ops.tokenmix.axial_sample)
def _flops(x_shape, offsets_shape, axis, *args, out_shape=None, **kwargs) -> int:
    """torch counts two FLOPs per multiply-add; a sample is two multiply-adds."""
    batch, height, width, channels = x_shape
    return 4 * batch * height * width * channels


# C++


def _sizes(x: Tensor, offsets: Tensor, axis: str) -> list:
    B, H, W, C = x.shape
    numbers = integers(B, H, W, C, offsets.shape[-1], offsets.stride(2))
    return [*numbers, int(axis == "width"), torch.get_num_threads()]


def _rows(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Offsets as the C++ code reads them: positions one after the other at one stride, so that halves need no copy."""
    offsets = offsets.to(dtype)
    _, H, W, G = offsets.shape
    step = offsets.stride(2)
    dense = offsets.stride(3) == 1 and step >= G and offsets.stride()[:2] == (H * W * step, W * step)
    return offsets if dense else offsets.contiguous()


def _native_forward(x: Tensor, offsets: Tensor, axis: str) -> Tensor:
    assert _NATIVE is not None
    dtype = exact(x, offsets)
    a, b = x.to(dtype).contiguous(), _rows(offsets, dtype)
    y = torch.empty_like(a)
    if y.numel():
        run = getattr(_NATIVE, f"axial_sample_forward_{DTYPES[dtype]}")
        run(*pointers(a, b, y), *_sizes(a, b, axis))
    return y.to(x.dtype)


def _native_backward(grad: Tensor, x: Tensor, offsets: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    assert _NATIVE is not None
    dtype = exact(x, offsets)
    a, b, g = x.to(dtype).contiguous(), _rows(offsets, dtype), grad.to(dtype).contiguous()
    grad_x, grad_offsets = torch.empty_like(a), torch.empty(offsets.shape, dtype=dtype)
    if g.numel():
        run = getattr(_NATIVE, f"axial_sample_backward_{DTYPES[dtype]}")
        run(*pointers(a, b, g, grad_x, grad_offsets), *_sizes(a, b, axis))
    return grad_x.to(x.dtype), grad_offsets.to(offsets.dtype)


# Triton


def _suits_triton(x: Tensor, offsets: Tensor) -> bool:
    """Its kernels compute in float32 and count the elements within one image in 32 bits."""
    last = sum((n - 1) * step for n, step in zip(offsets.shape[1:], offsets.stride()[1:], strict=True))
    return exact(x, offsets) == torch.float32 and max(math.prod(x.shape[1:]), last) < 2**31


def _triton_forward(x: Tensor, offsets: Tensor, axis: str) -> Tensor:
    from tokenmix.fast import axial_sample_triton

    if not _suits_triton(x, offsets):
        return reference(x, offsets, axis).contiguous()
    return axial_sample_triton.forward(x, offsets, axis)


def _triton_backward(grad: Tensor, x: Tensor, offsets: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    from tokenmix.fast import axial_sample_triton

    if not _suits_triton(x, offsets):
        return _reference_backward(grad, x, offsets, axis)
    return axial_sample_triton.backward(grad, x, offsets, axis)


# What runs where, settled once


if _NATIVE is not None:
    _sample.register_kernel("cpu")(_native_forward)
    _sample_backward.register_kernel("cpu")(_native_backward)

if _TRITON:
    _sample.register_kernel("cuda")(_triton_forward)
    _sample_backward.register_kernel("cuda")(_triton_backward)

# Where no device has a kernel, the reference itself: autograd goes through it without computing it a second time.
axial_sample = _sample if _NATIVE is not None or (_TRITON and torch.cuda.is_available()) else reference
