"""Depth-wise convolution along one axis: C++ for small maps on the CPU where it was built, else torch.

On maps of a few thousand numbers torch's call takes several times as long as the arithmetic. The op is
`torch.ops.tokenmix.axial_conv`; its gradients are an op as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from tokenmix.blocks.kernels import channels_last as kernels
from tokenmix.fast.arguments import DTYPES, exact, integers, pointers
from tokenmix.fast.cases import Case
from tokenmix.fast.native import library, missing

__all__ = ["AxialConv2d", "cases", "reference", "status"]

_NATIVE = library()

# Beyond so many numbers in a map torch's kernel is faster, and below so many one thread is.
_LARGE, _SMALL = 2**16, 2**15


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of (B, H, W, C) with weights (C, 1, k, 1) along the height or (C, 1, 1, k) along the width; k is odd."""
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=len(weight)).permute(0, 2, 3, 1)


def status() -> dict[str, tuple[str, str]]:
    """Device -> (which implementation runs there, why not a faster one)."""
    return {
        "cpu": ("C++ for small maps", "") if _NATIVE else ("torch", missing()),
        "cuda": ("torch", "a layer of cuDNN"),
    }


def cases(batch: int) -> Iterator[Case]:
    """Coordinate convolutions of EMSNet-Tiny at 224x224."""
    for side, channels in ((14, 16), (14, 24), (7, 32), (4, 32), (4, 64)):
        for axis, size in (("height", (11, 1)), ("width", (1, 11))):
            inputs = torch.randn(batch, side, side, channels), torch.randn(channels, 1, *size), torch.randn(channels)
            yield Case(f"{batch}x{side}x{side}x{channels}, {axis}", inputs, _run, reference)


@torch.library.custom_op("tokenmix::axial_conv", mutates_args=())
def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The reference, on devices without a kernel of their own."""
    return reference(x, weight, bias).contiguous()


@torch.library.custom_op("tokenmix::axial_conv_backward", mutates_args=())
def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    return _reference_backward(grad, x, weight)


def _reference_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    C, padding = len(weight), [side // 2 for side in weight.shape[2:]]
    grad, x = grad.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        grad, x, weight, [C], [1, 1], padding, [1, 1], False, [0, 0], C, [True, True, True]
    )
    return dx.permute(0, 2, 3, 1).contiguous(), dweight.contiguous(), dbias.contiguous()


@_convolve.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_convolve_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _keep(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _grads(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, dweight, dbias = _convolve_backward(grad, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None


_convolve.register_autograd(_grads, setup_context=_keep)


@register_flop_formula(torch.ops.tokenmix.axial_conv)
def _flops(x_shape, weight_shape, bias_shape, *args, out_shape=None, **kwargs) -> int:
    """torch counts two FLOPs per multiply-add, those with padding as well."""
    batch, height, width, channels = x_shape
    return 2 * batch * height * width * channels * weight_shape[2] * weight_shape[3]


class FastAxialConv2d(kernels.AxialConv2d):
    """`AxialConv2d` through the op. With a stride it keeps the reference."""

    def forward(self, x: Tensor) -> Tensor:
        return _convolve(x, self.weight, self.bias) if x.is_cpu and self.stride == (1, 1) else super().forward(x)


# C++


def _sizes(x: Tensor, weight: Tensor) -> list:
    kernel, along_width = weight.shape[2] * weight.shape[3], weight.shape[2] == 1
    return [*integers(*x.shape, kernel), int(along_width), torch.get_num_threads() if x.numel() >= _SMALL else 1]


def _native_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    assert _NATIVE is not None
    if x.numel() > _LARGE:
        return reference(x, weight, bias).contiguous()
    dtype = exact(x, weight)
    a, w = x.to(dtype).contiguous(), weight.to(dtype).contiguous()
    b = None if bias is None else bias.to(dtype).contiguous()
    y = torch.empty_like(a)
    if y.numel():
        getattr(_NATIVE, f"axial_conv_forward_{DTYPES[dtype]}")(*pointers(a, w, b, y), *_sizes(x, weight))
    return y.to(x.dtype)


def _native_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert _NATIVE is not None
    if x.numel() > _LARGE:
        return _reference_backward(grad, x, weight)
    dtype = exact(x, weight)
    a, w, g = x.to(dtype).contiguous(), weight.to(dtype).contiguous(), grad.to(dtype).contiguous()
    new = torch.empty if g.numel() else torch.zeros
    dx, dweight, dbias = (new(shape, dtype=dtype) for shape in (x.shape, weight.shape, (len(weight),)))
    if g.numel():
        run = getattr(_NATIVE, f"axial_conv_backward_{DTYPES[dtype]}")
        run(*pointers(a, w, g, dx, dweight, dbias), *_sizes(x, weight))
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


# What runs where, settled once


if _NATIVE is not None:
    _convolve.register_kernel("cpu")(_native_forward)
    _convolve_backward.register_kernel("cpu")(_native_backward)

# Without a kernel the reference itself: autograd goes through it.
_run = _convolve if _NATIVE is not None else reference
AxialConv2d = FastAxialConv2d if _NATIVE is not None else kernels.AxialConv2d
