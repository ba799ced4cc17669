"""Several calls that read the same name, written as one call whose result is split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenmix.blocks.ops import find_op
from tokenmix.compiler.bind import hyperparameters, match_arguments
from tokenmix.compiler.definition import MODULE_ATTRIBUTES, Definition, calls_in, statements
from tokenmix.dsl import syntax
from tokenmix.dsl.expressions import names_in
from tokenmix.dsl.source import Span

__all__ = ["JoinedCalls", "joined_calls"]


@dataclass(frozen=True)
class JoinedCalls:
    """Calls of layers that become one call in front of the first of them.

    Attributes:
        spans: the calls, in the order of the text.
        labels: of their submodules.
        names: of the parts of the result, which stand in place of the calls.
        label: of the one submodule.
        statement: the line that makes the parts.
        before: the line in front of which it stands.
    """

    spans: tuple[Span, ...]
    labels: tuple[str, ...]
    names: tuple[str, ...]
    label: str
    statement: syntax.Assign
    before: syntax.Statement


def joined_calls(definition: Definition, spans: tuple[Span, ...], *, bias: bool) -> JoinedCalls | None:
    """How layers become one in the text: they stand in lines side by side and read the same name, which keeps its value
    between them. None where they do not.
    """
    lines = _lines_with(definition.block.body, set(spans))
    sources = {span: name for line in lines for span, name in _sources(line) if span in spans}
    if len(sources) != len(spans) or len(set(sources.values())) != 1:
        return None
    (source,) = set(sources.values())
    if any(isinstance(s, syntax.Assign) and source in {t.name for t in s.targets} for s in lines[:-1]):
        return None
    calls = [definition.calls[span] for span in spans]
    labels = tuple(definition.labels[id(call)] for call in calls)
    taken = {*definition.labels.values(), *definition.modules, *names_in(definition.block), *MODULE_ATTRIBUTES}
    taken |= {i.name for i in definition.signature.inputs} | {p.name for p in definition.signature.parameters}
    taken |= {t.name for s in statements(definition.block.body) if isinstance(s, syntax.Assign) for t in s.targets}
    label, *names = (_free(name, taken) for name in ("_".join(labels), *(f"{name}_part" for name in labels)))
    place = calls[0].span
    op = find_op(calls[0].callee)
    assert op is not None
    widths = [match_arguments(op.signature, hyperparameters(op.signature, c), c)[0]["out"].value for c in calls]
    total: syntax.Expr = widths[0]
    for width in widths[1:]:
        total = syntax.Binary(place, "+", total, width)
    settings = (syntax.Argument(place, "out", total), syntax.Argument(place, "bias", syntax.Literal(place, bias)))
    layer = syntax.Call(place, op.name, place, arguments=settings, label=label)
    sizes = (syntax.Argument(place, "sizes", syntax.ListOf(place, tuple(widths))),)
    split = syntax.Call(place, "split_channels", place, arguments=sizes)
    value = syntax.Pipe(place, syntax.Name(place, source), (layer, split))
    statement = syntax.Assign(place, tuple(syntax.Name(place, name) for name in names), value)
    return JoinedCalls(spans, labels, tuple(names), label, statement, lines[0])


def _lines_with(body: tuple[syntax.Statement, ...], spans: set[Span]) -> tuple[syntax.Statement, ...]:
    """The lines of one body from the first to the last that holds one of the calls; none if bodies are several."""
    holding = [i for i, s in enumerate(body) if not spans.isdisjoint(c.span for c in calls_in(s))]
    lines = body[holding[0] : holding[-1] + 1] if holding else ()
    inner: list[tuple[syntax.Statement, ...]] = []
    for line in lines:
        if isinstance(line, syntax.If):
            inner += [line.then, line.otherwise]
        elif isinstance(line, syntax.For):
            inner.append(line.body)
    if not inner:
        return lines
    found = [part for part in inner if _lines_with(part, spans)]
    return _lines_with(found[0], spans) if len(lines) == len(found) == 1 else ()


def _sources(node: object) -> Iterator[tuple[Span, str]]:
    """Calls below a node whose first tensor is a name, with the name."""
    if isinstance(node, syntax.Pipe) and isinstance(node.source, syntax.Name):
        yield node.calls[0].span, node.source.name
    elif isinstance(node, syntax.Call) and node.tensors and isinstance(node.tensors[0].value, syntax.Name):
        yield node.span, node.tensors[0].value.name
    if isinstance(node, syntax.Node):
        for value in vars(node).values():
            yield from _sources(value)
    elif isinstance(node, tuple):
        for item in node:
            yield from _sources(item)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
