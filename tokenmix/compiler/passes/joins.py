"""Linear layers that read the same value become one layer, whose result is split."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from tokenmix.compiler.passes.flow import Flow, FlowOp
from tokenmix.compiler.passes.joined_calls import JoinedCalls, joined_calls
from tokenmix.compiler.passes.rewrite import Edits
from tokenmix.dsl.source import Span

__all__ = ["Join", "join_layers"]


@dataclass(frozen=True)
class Join:
    """Layers that become one: their weights stand below each other in it.

    Attributes:
        layers: paths of the layers.
        into: path of the layer that they become.
    """

    layers: tuple[str, ...]
    into: str


# What reads a part of a wider value as it lies. Others (norms, further layers) would copy it, and lose what is gained.
_READERS = frozenset(
    [
        *("abstract_window_attention", "attention", "attention_scores", "talking_heads_attention", "window_attention"),
        *("add", "mul", "sub", "to_tokens", "window_partition"),
    ]
)


def join_layers(flows: list[Flow], edits: Edits) -> None:
    """Join the linear layers of a block that read the same value, wherever every use of all their lines allows it."""
    groups: dict[Span, set[tuple[Span, ...]]] = defaultdict(set)
    for flow in flows:
        for ops in _readers_of_one(flow):
            spans = tuple(op.span for op in ops if op.span is not None)
            for span in spans:
                groups[span].add(spans if len(set(spans)) == len(spans) else ())
    owners = {span: d for flow in flows for d in flow.definitions for span in d.calls}
    chosen: dict[tuple[Span, ...], JoinedCalls] = {}
    for group in {g for among in groups.values() for g in among if len(g) > 1}:
        if all(groups[span] == {group} for span in group):
            ops = [op for flow in flows for op in flow.ops.values() if op.span in group]
            biased = {op.arguments["bias"] or op.span in edits.biased for op in ops}
            calls = joined_calls(owners[group[0]], group, bias=True in biased)
            if calls is not None:
                chosen[group] = calls
                edits.joined.append(calls)
                edits.biased |= set(group) if True in biased else set()
    for flow in flows:
        joins = []
        for ops in _readers_of_one(flow):
            made = chosen.get(tuple(op.span for op in ops if op.span is not None))
            if made is not None:
                first = ops[0]
                place = first.module[len(first.block) + len(made.labels[0]) :]  # of a round of a loop
                joins.append(Join(tuple(op.module for op in ops), f"{first.block}{made.label}{place}"))
        edits.joins.append(joins)


def _readers_of_one(flow: Flow) -> list[list[FlowOp]]:
    """The layers of a block that read the same value and could be one."""
    found: dict[tuple, list[FlowOp]] = defaultdict(list)
    for name, op in flow.ops.items():
        if op.op.name in ("linear", "pointwise") and op.span is not None:
            readers = [flow.ops.get(reader) for reader, _ in flow.readers(name)]
            if readers and all(r is not None and r.op.name in _READERS for r in readers):
                found[op.block, op.op.name, op.inputs[0]].append(op)
    return list(found.values())
