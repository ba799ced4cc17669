"""Linear layers and convolutions with the activation behind them in one pass over memory.

That is for where gradients are not wanted. On the CPU oneDNN computes the activation on results that are still in the
cache. Its fused calls are operators that torch has for its own compiler's sake; they know no gradients. Elsewhere the
activation is computed in place. In a trace (`torch.compile`, `torch.export`) layers stay as they are: the compiler
fuses them itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from tokenmix.blocks.kernels import channels_last as kernels
from tokenmix.fast.cases import Case

__all__ = ["FusedConv2d", "FusedLinear", "FusedPointwise", "cases", "status"]

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_.default,
    "relu": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "sigmoid": torch.sigmoid_,
    "silu": lambda x: F.silu(x, inplace=True),
}

# What oneDNN calls activations: name, constants, algorithm. Its relu makes 0 of NaN, so that is computed in place.
_FUSED: dict[str, tuple[str, list[float], str]] = {
    "gelu": ("gelu", [], "none"),
    "sigmoid": ("sigmoid", [], ""),
    "silu": ("swish", [], ""),
}

# Below so many input elements the longer call costs more than the pass over memory that it saves.
_SMALL = 8192


def status() -> dict[str, tuple[str, str]]:
    """Device -> (which implementation runs there, why not a faster one)."""
    why = "" if _WORKS else "this torch has no fused oneDNN operators"
    return {
        "cpu": ("oneDNN, fused" if _WORKS else "in place", why),
        "cuda": ("in place", "torch.compile fuses it"),
    }


def cases(batch: int) -> Iterator[Case]:
    """The first layers of MixFormer-B4's perceptrons at 224x224, with their GELU."""
    for side, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
        inputs = torch.randn(batch, side, side, channels), torch.randn(4 * channels, channels) * channels**-0.5
        with torch.device("meta"):
            layers = [kind(channels, 4 * channels, activation="gelu") for kind in (FusedLinear, kernels.FusedLinear)]
        sides = [partial(_layer_of, layer) for layer in layers]
        yield Case(f"linear, {batch}x{side}x{side}x{channels}", (*inputs, torch.randn(4 * channels)), *sides)


def _layer_of(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A layer with other weights than its own."""
    return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))


def _takes_no_gradient(layer: Any, x: Tensor) -> bool:
    wanted = torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad)
    return not (wanted or torch.compiler.is_compiling())


def _suits(layer: Any, x: Tensor) -> bool:
    """Whether oneDNN is to compute a layer."""
    return (
        _WORKS
        and layer.activation in _FUSED
        and x.dtype == layer.weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= _SMALL
        and not torch.is_autocast_enabled("cpu")
    )


class FusedConv2d(kernels.FusedConv2d):
    """As in `blocks/kernels/channels_last.py`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _takes_no_gradient(self, x):
            return super().forward(x)
        if not _suits(self, x):
            return _IN_PLACE[self.activation](kernels.Conv2d.forward(self, x))
        geometry = self.padding, self.stride, self.dilation, self.groups
        y = torch.ops.mkldnn._convolution_pointwise(
            x.permute(0, 3, 1, 2), self.weight, self.bias, *geometry, *_FUSED[self.activation]
        )
        return y.permute(0, 2, 3, 1)


class FusedLinear(kernels.FusedLinear):
    """As in `blocks/kernels/channels_last.py`."""

    def forward(self, x: Tensor) -> Tensor:
        if not _takes_no_gradient(self, x):
            return super().forward(x)
        if not _suits(self, x):
            return _IN_PLACE[self.activation](nn.Linear.forward(self, x))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *_FUSED[self.activation])


class FusedPointwise(FusedLinear, kernels.FusedPointwise):
    """As in `blocks/kernels/channels_last.py`."""


def _works() -> bool:
    """Whether the operators are there and compute what they should."""
    x, weight, bias = torch.linspace(-3, 3, 32).view(4, 8), torch.linspace(-1, 1, 64).view(8, 8), torch.ones(8)
    try:
        for name, how in _FUSED.items():
            expected = getattr(F, name)(F.linear(x, weight, bias))
            linear = torch.ops.mkldnn._linear_pointwise(x, weight, bias, *how)
            image, kernel = x.view(1, 2, 2, 8).permute(0, 3, 1, 2), weight.view(8, 8, 1, 1)
            geometry = [0, 0], [1, 1], [1, 1], 1
            conv = torch.ops.mkldnn._convolution_pointwise(image, kernel, bias, *geometry, *how)
            for y in (linear, conv.permute(0, 2, 3, 1).reshape(4, 8)):
                if not torch.allclose(y, expected, rtol=1e-4, atol=1e-5):
                    return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


_WORKS = torch.backends.mkldnn.is_available() and _works()

if _WORKS:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return 2 * torch.Size(x_shape).numel() * weight_shape[0]

    @register_flop_formula(torch.ops.mkldnn._convolution_pointwise)
    def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
        return conv_flop_count(x_shape, weight_shape, out_shape)
