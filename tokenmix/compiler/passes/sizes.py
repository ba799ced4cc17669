"""What does nothing at a given image size, taken out."""

from __future__ import annotations

from tokenmix.compiler.passes.flow import Flow, FlowOp
from tokenmix.compiler.passes.rewrite import Edits
from tokenmix.dsl.source import Span

__all__ = ["drop_idle"]

_RESIZING = frozenset(["adaptive_avg_pool", "crop", "pad_to", "resize"])


def drop_idle(flows: list[Flow], edits: Edits) -> None:
    """Take out paddings, crops and resizings that leave every map as it is, wherever every use of a line does."""
    idle: dict[Span, bool] = {}
    for flow in flows:
        for op in flow.ops.values():
            if op.span is not None and op.op.name in _RESIZING:
                idle[op.span] = idle.get(op.span, True) and _is_idle(flow, op)
    removed = {span for span, is_idle in idle.items() if is_idle}
    edits.removed |= removed
    for flow in flows:
        flow.bypass(removed)


def _is_idle(flow: Flow, op: FlowOp) -> bool:
    return flow.tensor(op.inputs[0]) == op.outputs[0]
