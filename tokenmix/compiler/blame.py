"""Who set the values that a failing line reads: from a line inside a block back to the words of a spec.

A block says what it needs where it needs it; the number that does not fit was written somewhere else. A finding
points there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tokenmix.compiler.bind import hyperparameters, match_arguments
from tokenmix.compiler.definition import DIMENSIONS, Definition, calls_in
from tokenmix.compiler.spec import Spec, parse_scalar
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Mistake
from tokenmix.dsl.expressions import FUNCTIONS, Evaluator, names_in
from tokenmix.dsl.source import Span
from tokenmix.dsl.yaml_reader import YamlList, YamlNode, YamlScalar

__all__ = [
    "SETTINGS",
    "Frame",
    "Origins",
    "Place",
    "Trace",
    "dimensions_in",
    "failing_part",
    "fitting_values",
    "reads",
    "trace",
]

SETTINGS = "<set>"  # name of the text of values that came with a call or from the command line

# A block on its way to the failing line, with the call that led into it.
Frame = tuple[Definition, syntax.Call]


@dataclass
class Trace:
    """Where the values of a failing line come from.

    Attributes:
        arguments: what the spec hands to the outermost block, as far as the line depends on it.
        literals: numbers that the user's blocks hand on.
        dimensions: letters of the dimensions that the line reads.
    """

    arguments: list[syntax.Expr] = field(default_factory=list)
    literals: list[Span] = field(default_factory=list)
    dimensions: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Place:
    """A value in a spec; `own` if the user wrote it, not a base; `name` is the parameter it belongs to, if any."""

    span: Span
    own: bool
    name: str = ""


def reads(node: object) -> Iterator[syntax.Name]:
    """Names that an expression, or a call's hyperparameters, read, in the order of the text."""
    if isinstance(node, syntax.Name):
        yield node
    elif isinstance(node, syntax.Call):
        for argument in (*node.tensors, *node.arguments):
            yield from reads(argument.value)
    elif isinstance(node, syntax.Node):
        for value in vars(node).values():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, syntax.Node):
                    yield from reads(item)


def dimensions_in(node: object) -> set[str]:
    """Letters of the dimensions that an expression reads: `C`, or the `H` of `x.H`."""
    return {name.dim or name.name for name in reads(node) if name.dim or name.name in DIMENSIONS}


def trace(frames: Sequence[Frame], about: object) -> Trace:
    """Follow what `about`, in the innermost block, reads through the calls of the blocks around it."""
    found = Trace()
    names = _names(about.arguments if isinstance(about, syntax.Call) else (about,), found)
    if isinstance(about, syntax.Call):
        found.dimensions |= set(DIMENSIONS)
    for level in range(len(frames) - 1, -1, -1):
        definition, call = frames[level]
        names = _with_locals(definition, names, found)
        matched, _ = match_arguments(definition.signature, hyperparameters(definition.signature, call), call)
        given = [matched[name].value for name in names if name in matched]
        if level == 0:
            found.arguments = given
            break
        caller = frames[level - 1][0]
        for expr in given:
            if not names_in(expr) and not caller.shipped:
                found.literals.append(expr.span)
        names = _names(given, found)
    return found


def _names(nodes: Sequence[object], found: Trace) -> list[str]:
    names = []
    for node in nodes:
        found.dimensions |= dimensions_in(node)
        names += [name.name for name in reads(node) if not name.dim]
    return list(dict.fromkeys(names))


def _with_locals(definition: Definition, names: list[str], found: Trace) -> list[str]:
    """Names and, for those that the block computed from numbers, what it computed them from."""
    computed: dict[str, list[syntax.Expr]] = {}
    for statement in _statements(definition.block.body):
        if isinstance(statement, syntax.Assign) and not any(
            c.callee not in FUNCTIONS for c in calls_in(statement.value)
        ):
            for target in statement.targets:
                computed.setdefault(target.name, []).append(statement.value)
        elif isinstance(statement, syntax.For):
            computed.setdefault(statement.variable.name, []).append(statement.stop)
    names = list(names)
    for name in names:  # grows while it is walked
        names += [n for n in _names(computed.get(name, []), found) if n not in names]
    return names


def _statements(body: Sequence[syntax.Statement]) -> Iterator[syntax.Statement]:
    for statement in body:
        yield statement
        for inner in (getattr(statement, a, ()) for a in ("body", "then", "otherwise")):
            yield from _statements(inner)


class Origins:
    """Which words of the specs gave each value.

    Attributes:
        settings: parameter -> the node that gave its value.
        own: names of the sources that the user wrote, bases left out.
        input: the input shape that the specs ask for, and where they do.
    """

    def __init__(self, spec: Spec, settings: Mapping[str, YamlNode]):
        self.settings = settings
        self.own = frozenset({spec.source.name, SETTINGS})
        self.input = spec.input
        self.input_span = spec.input_span

    def places(self, expr: syntax.Expr, names: Mapping[str, Any]) -> list[Place]:
        """The values that an expression of a spec, such as `heads[i]`, reads, in the order of the text.

        Args:
            expr: the expression.
            names: what its names stand for.
        """
        found: list[Place] = []
        self._expression(expr, names, found, frozenset())
        if not found:
            found.append(Place(expr.span, expr.span.source.name in self.own))
        return list(dict.fromkeys(found))

    def _expression(self, expr: object, names: Mapping[str, Any], found: list[Place], seen: frozenset[str]) -> None:
        if isinstance(expr, syntax.Name):
            node = self.settings.get(expr.name)
            if node is not None and expr.name not in seen:
                self._node(expr.name, node, names, found, seen)
        elif isinstance(expr, syntax.Index) and isinstance(expr.base, syntax.Name) and expr.base.name in self.settings:
            node = self.settings[expr.base.name]
            try:
                index = Evaluator(names, "this spec").value(expr.index)
            except Mistake:
                index = None
            if isinstance(node, YamlList) and isinstance(index, int) and -len(node.items) <= index < len(node.items):
                node = node.items[index]
            self._node(expr.base.name, node, names, found, seen)
        elif isinstance(expr, syntax.Node):
            for value in vars(expr).values():
                for item in value if isinstance(value, tuple) else (value,):
                    if isinstance(item, syntax.Node):
                        self._expression(item, names, found, seen)

    def _node(
        self, name: str, node: YamlNode, names: Mapping[str, Any], found: list[Place], seen: frozenset[str]
    ) -> None:
        own = node.span.source.name in self.own
        if not own and isinstance(node, YamlScalar) and isinstance(node.value, str):
            # A default that is computed from other parameters: those may be the user's.
            before = len(found)
            with suppress(Mistake):
                self._expression(parse_scalar(node), names, found, seen | {name})
            if len(found) > before:
                return
        found.append(Place(node.span, own, name))


def failing_part(condition: syntax.Expr, evaluator: Evaluator) -> syntax.Expr:
    """The part of a condition that does not hold: of `a and b`, the first one that is false."""
    while isinstance(condition, syntax.Binary) and condition.op == "and":
        condition = condition.left if evaluator.value(condition.left) is False else condition.right
    return condition


def fitting_values(condition: syntax.Expr, evaluator: Evaluator, name: str) -> str:
    """Near values of a number under which a condition would hold, as a help text; empty if none is near."""
    value = evaluator.names.get(name)
    if type(value) is not int:
        return ""
    reach = max(64, min(abs(value), 512))
    below, above = range(value - 1, max(0, value - reach), -1), range(value + 1, value + reach)
    near = [next((v for v in values if _holds(condition, evaluator, name, v)), None) for values in (below, above)]
    fits = [str(v) for v in near if v is not None]
    return f"near values that fit: {name} = {' or '.join(fits)}" if fits else ""


def _holds(condition: syntax.Expr, evaluator: Evaluator, name: str, value: int) -> bool:
    names = evaluator.names
    assert isinstance(names, dict)
    before = names[name]
    names[name] = value
    try:
        return evaluator.value(condition) is True
    except Mistake:
        return False
    finally:
        names[name] = before
