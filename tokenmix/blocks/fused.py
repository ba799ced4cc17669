"""Layers together with the activation behind them. No block names them: they come from a pass for inference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor
from tokenmix.blocks.ops import find_op
from tokenmix.dsl.syntax import Signature

__all__ = ["find_fused", "fused_name"]

_ACTIVATIONS = frozenset(["gelu", "relu", "relu6", "sigmoid", "silu"])

# Class of a layer -> its kind that has an activation.
_CLASSES = {"nn.Linear": "FusedLinear", "Pointwise": "FusedPointwise", "Conv2d": "FusedConv2d"}
_LAYERS = frozenset(["conv", "dwconv", "linear", "pointwise"])


def fused_name(layer: Op, arguments: Mapping[str, Any], activation: Op) -> str:
    """What a layer and an activation are called as one op; empty where there is none.

    No block can be called so: the name is none of the language.
    """
    if layer.name not in _LAYERS or activation.name not in _ACTIVATIONS or arguments.get("axis", "both") != "both":
        return ""
    return f"{layer.name}+{activation.name}"


@cache
def find_fused(name: str) -> Op | None:
    """The op of a name that `fused_name` made."""
    first, plus, second = name.partition("+")
    layer, activation = find_op(first), find_op(second)
    return _Fused(layer, activation) if plus and layer and activation else None


class _Fused(Op):
    """A layer and the activation behind it; weights and arguments are the layer's."""

    helpers = tuple(_CLASSES.values())

    def __init__(self, layer: Op, activation: Op):
        self.layer = layer
        self.activation = activation

    @property
    def name(self) -> str:
        return f"{self.layer.name}+{self.activation.name}"

    @property
    def signature(self) -> Signature:
        return replace(self.layer.signature, name=self.name)

    def check(self, *inputs: Tensor, **arguments: Any) -> None:
        self.layer.check(*inputs, **arguments)

    def shape(self, *inputs: Tensor, **arguments: Any) -> Tensor | tuple[Tensor, ...]:
        return self.layer.shape(*inputs, **arguments)

    def weights(self, *inputs: Tensor, **arguments: Any) -> Mapping[str, tuple[int, ...]]:
        return self.layer.weights(*inputs, **arguments)

    def cost(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], **arguments: Any) -> Tally:
        return Tally.sum([self.layer.cost(inputs, outputs, **arguments), self.activation.cost(outputs, outputs)])

    def module(self, *inputs: Tensor, **arguments: Any) -> str | None:
        made = self.layer.module(*inputs, **arguments)
        assert made is not None
        name, bracket, rest = made.partition("(")
        return f'{_CLASSES[name]}{bracket}{rest[:-1]}, activation="{self.activation.name}")'
