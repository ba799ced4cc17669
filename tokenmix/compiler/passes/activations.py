"""Activations fused into the layer in front of them: one pass over memory instead of two."""

from __future__ import annotations

from tokenmix.blocks.fused import fused_name
from tokenmix.compiler.passes.flow import Flow
from tokenmix.compiler.passes.rewrite import Edits
from tokenmix.dsl.source import Span

__all__ = ["fuse_activations"]


def fuse_activations(flows: list[Flow], edits: Edits) -> None:
    """Fuse an activation with the layer whose only reader it is, wherever every use of both lines allows it."""
    ahead: dict[Span, set[Span | None]] = {}  # activation -> layers in front of it
    behind: dict[Span, set[tuple[str, Span | None]]] = {}  # layer -> what it would become, with which activation
    for flow in flows:
        for name, op in flow.ops.items():
            if op.span is None:
                continue
            layer = flow.ops.get(op.inputs[0][0]) if op.inputs else None
            fits = layer is not None and flow.only_reader(op.inputs[0][0]) == name
            fused = fused_name(layer.op, layer.arguments, op.op) if layer is not None and fits else ""
            ahead.setdefault(op.span, set()).add(layer.span if layer is not None and fused else None)
            reader = flow.ops.get(flow.only_reader(name))
            made = fused_name(op.op, op.arguments, reader.op) if reader is not None else ""
            behind.setdefault(op.span, set()).add((made, reader.span if reader is not None and made else None))
    fused_layers = {span: next(iter(made))[0] for span, made in behind.items() if len({m for m, _ in made}) == 1}
    fused_layers = {span: name for span, name in fused_layers.items() if name}
    removed = {span for span, layers in ahead.items() if layers <= fused_layers.keys()}
    while True:  # a line keeps its partner only if the partner keeps it
        layers = {span for span in fused_layers if {a for _, a in behind[span]} <= removed}
        kept = {span for span in removed if ahead[span] <= layers}
        if layers == fused_layers.keys() and kept == removed:
            break
        fused_layers = {span: fused_layers[span] for span in layers}
        removed = kept
    for span, name in fused_layers.items():
        edits.renamed[span] = name
    edits.removed |= removed
    for flow in flows:
        flow.bypass(removed)
