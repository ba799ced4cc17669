"""Depth-wise transposed convolution with equal kernel and stride: C++ on the CPU where it was built, else torch.

Every pixel is multiplied with a patch and nothing overlaps, yet torch's CPU path makes columns and folds them, group by
group. The op is `torch.ops.tokenmix.conv_transpose`; its gradients are an op as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from tokenmix.blocks.kernels import channels_last as kernels
from tokenmix.fast.arguments import DTYPES, exact, integers, pointers
from tokenmix.fast.cases import Case
from tokenmix.fast.native import library, missing

__all__ = ["ConvTranspose2d", "cases", "reference", "status"]

_NATIVE = library()

# Below so many numbers in the result one thread is faster than several.
_SMALL = 2**15


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """`F.conv_transpose2d` of (B, H, W, C) with weights (C, 1, k, k), k also the stride, in `out` groups."""
    y = F.conv_transpose2d(x.permute(0, 3, 1, 2), weight, bias, stride=weight.shape[-1], groups=out)
    return y.permute(0, 2, 3, 1)


def status() -> dict[str, tuple[str, str]]:
    """Device -> (which implementation runs there, why not a faster one)."""
    return {"cpu": ("C++", "") if _NATIVE else ("torch", missing()), "cuda": ("torch", "a layer of cuDNN")}


def cases(batch: int) -> Iterator[Case]:
    """Propagation layers of EMSNet-Tiny at 224x224."""
    for side, channels, out, kernel in (
        (28, 16, 8, 2),
        (10, 16, 16, 6),
        (14, 24, 12, 2),
        (7, 32, 16, 2),
        (4, 32, 32, 4),
    ):
        inputs = torch.randn(batch, side, side, channels), torch.randn(channels, 1, kernel, kernel), torch.randn(out)
        name = f"{batch}x{side}x{side}x{channels} to {out}, {kernel}x{kernel}"
        yield Case(name, inputs, partial(_run, out=out), partial(reference, out=out))


@torch.library.custom_op("tokenmix::conv_transpose", mutates_args=())
def _spread(x: Tensor, weight: Tensor, bias: Tensor | None, out: int) -> Tensor:
    """The reference, on devices without a kernel of their own."""
    return reference(x, weight, bias, out).contiguous()


@torch.library.custom_op("tokenmix::conv_transpose_backward", mutates_args=())
def _spread_backward(grad: Tensor, x: Tensor, weight: Tensor, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    k = weight.shape[-1]
    grad, x = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    grads = torch.ops.aten.convolution_backward(
        grad, x, weight, [out], [k, k], [0, 0], [1, 1], True, [0, 0], out, [True, True, True]
    )
    return grads[0].permute(0, 2, 3, 1).contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_spread.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, out: int) -> Tensor:
    B, H, W, _ = x.shape
    k = weight.shape[-1]
    return x.new_empty(B, H * k, W * k, out)


@_spread_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, out: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(out)


def _keep(ctx, inputs, output) -> None:
    x, weight, ctx.bias, ctx.out = inputs[0], inputs[1], inputs[2] is not None, inputs[3]
    ctx.save_for_backward(x, weight)


def _grads(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    dx, dweight, dbias = _spread_backward(grad, *ctx.saved_tensors, ctx.out)
    return dx, dweight, dbias if ctx.bias else None, None


_spread.register_autograd(_grads, setup_context=_keep)


@register_flop_formula(torch.ops.tokenmix.conv_transpose)
def _flops(x_shape, weight_shape, bias_shape, out, *args, out_shape=None, **kwargs) -> int:
    """torch counts two FLOPs per multiply-add."""
    batch, height, width, channels = x_shape
    return 2 * batch * height * width * channels * weight_shape[-1] ** 2


class FastConvTranspose2d(kernels.ConvTranspose2d):
    """`ConvTranspose2d` through the op."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return _spread(x, self.weight, self.bias, self.out_channels) if x.is_cpu else super().forward(x)


# C++


def _sizes(x: Tensor, weight: Tensor, out: int) -> list:
    (B, H, W, _), k = x.shape, weight.shape[-1]
    threads = torch.get_num_threads() if B * H * W * k * k * out >= _SMALL else 1
    return [*integers(*x.shape, out, k), threads]


def _native_forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: int) -> Tensor:
    assert _NATIVE is not None
    dtype = exact(x, weight)
    a, w = x.to(dtype).contiguous(), weight.to(dtype).contiguous()
    b = None if bias is None else bias.to(dtype).contiguous()
    (B, H, W, _), k = x.shape, weight.shape[-1]
    y = torch.empty(B, H * k, W * k, out, dtype=dtype)
    if y.numel():
        getattr(_NATIVE, f"conv_transpose_forward_{DTYPES[dtype]}")(*pointers(a, w, b, y), *_sizes(x, weight, out))
    return y.to(x.dtype)


def _native_backward(grad: Tensor, x: Tensor, weight: Tensor, out: int) -> tuple[Tensor, Tensor, Tensor]:
    assert _NATIVE is not None
    dtype = exact(x, weight)
    a, w, g = x.to(dtype).contiguous(), weight.to(dtype).contiguous(), grad.to(dtype).contiguous()
    new = torch.empty if g.numel() else torch.zeros
    dx, dweight, dbias = (new(shape, dtype=dtype) for shape in (x.shape, weight.shape, (out,)))
    if g.numel():
        run = getattr(_NATIVE, f"conv_transpose_backward_{DTYPES[dtype]}")
        run(*pointers(a, w, g, dx, dweight, dbias), *_sizes(x, weight, out))
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


# What runs where, settled once


if _NATIVE is not None:
    _spread.register_kernel("cpu")(_native_forward)
    _spread_backward.register_kernel("cpu")(_native_backward)

# Without a kernel the reference itself: autograd goes through it.
_run = _spread if _NATIVE is not None else reference
ConvTranspose2d = FastConvTranspose2d if _NATIVE is not None else kernels.ConvTranspose2d
