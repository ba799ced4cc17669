"""Norms folded into their neighbours: their scale and shift become part of the weights of a layer."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmix.compiler.passes.flow import Flow, FlowOp
from tokenmix.compiler.passes.rewrite import Edits
from tokenmix.dsl.source import Span

__all__ = ["Fold", "fold_norms"]


@dataclass(frozen=True)
class Fold:
    """A norm and a layer that takes its scale and shift in.

    Attributes:
        norm: path of the norm. A batch norm is gone, a layer norm stays without scale and shift.
        layer: path of the layer.
        behind: whether the norm stood behind the layer, else in front of it.
        first: in front, the input channel of the layer where those of the norm begin.
    """

    norm: str
    layer: str
    behind: bool
    first: int = 0


# Layers that a per-channel scale and shift behind them can be folded into, those that take one from in front, and what
# may stand between a norm and the layer behind it: it hands every channel on as it is.
_BEHIND = frozenset(["conv", "dwconv", "pointwise", "linear", "dwconv_transpose"])
_FRONT = frozenset(["conv", "pointwise", "linear"])
_BETWEEN = frozenset(["concat", "crop", "drop_path", "to_map", "to_tokens"])


def fold_norms(flows: list[Flow], edits: Edits) -> None:
    """Fold the norms of a model, wherever every use of a line allows it.

    Behind a convolution or linear layer a batch norm is folded always. In front of one the scale and shift of a norm
    are folded where every input position counts: in front of a linear layer or 1x1 convolution, and of a convolution
    without padding. (Zeros of a padding come after the shift and would be shifted too.) If several layers read a norm,
    each of them takes it in.
    """
    found = [{name: _folds(flow, name) for name, op in flow.ops.items() if _scales(op)} for flow in flows]
    kept: set[Span | None] = {None}
    kept |= {f.ops[name].span for f, folds in zip(flows, found, strict=True) for name in folds if not folds[name]}
    for flow, folds in zip(flows, found, strict=True):
        chosen = [pair for name, pairs in folds.items() if flow.ops[name].span not in kept for pair in pairs]
        edits.folds.append([fold for fold, _ in chosen])
        for _, layer in chosen:
            edits.biased.add(layer)
            edits.set(layer, bias=None)
        for name in folds:
            norm = flow.ops[name].span
            if norm is None or norm in kept:
                continue
            if flow.ops[name].op.name == "batch_norm":
                edits.removed.add(norm)
            else:
                edits.set(norm, affine=False)
    for flow in flows:
        flow.bypass(edits.removed)


def _scales(op: FlowOp) -> bool:
    """Whether an op is a norm with a scale and a shift for every channel."""
    return op.op.name == "batch_norm" or (op.op.name == "layer_norm" and op.arguments["affine"])


def _folds(flow: Flow, name: str) -> list[tuple[Fold, Span]]:
    """The folds that make a norm superfluous, with the calls of the layers; none where it has to stay."""
    norm = flow.ops[name]
    if norm.span is None:
        return []
    before = flow.ops.get(norm.inputs[0][0])
    if (
        norm.op.name == "batch_norm"
        and before is not None
        and before.span is not None
        and before.op.name in _BEHIND
        and flow.only_reader(norm.inputs[0][0]) == name
    ):
        return [(Fold(norm.module, before.module, behind=True), before.span)]
    readers = _readers(flow, name, 0)
    if readers is None:
        return []
    return [
        (Fold(norm.module, layer.module, behind=False, first=first), layer.span)
        for layer, first in readers
        if layer.span is not None
    ]


def _readers(flow: Flow, name: str, first: int) -> list[tuple[FlowOp, int]] | None:
    """Every layer that can take in a scale and shift of a value, with the channel where the value begins in its input.

    None if something else reads it.
    """
    found: list[tuple[FlowOp, int]] = []
    for reader, position in flow.readers(name):
        op = flow.ops.get(reader)
        if op is None:
            return None
        if op.op.name in _FRONT and op.span is not None and _reads_all(op):
            found.append((op, first))
            continue
        if op.op.name not in _BETWEEN:
            return None
        start = first
        if op.op.name == "concat":
            start += sum(flow.tensor(origin).C for origin in op.inputs[:position])
        behind = _readers(flow, reader, start)
        if behind is None:
            return None
        found += behind
    return found or None


def _reads_all(op: FlowOp) -> bool:
    """Whether a layer sees no padding and every input channel."""
    if op.op.name != "conv":
        return True
    padding = op.arguments["padding"]
    return (op.arguments["kernel"] // 2 if padding == -1 else padding) == 0 and op.arguments["groups"] == 1
