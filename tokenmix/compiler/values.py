"""Values of a spec's parameters: what the spec, the specs it extends and the user's settings say."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from tokenmix.compiler.blame import SETTINGS, Origins
from tokenmix.compiler.spec import ParameterDecl, Spec, parse_scalar
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding, Mistake, Note, nearest
from tokenmix.dsl.expressions import Evaluator, RampRate, coerce, describe, listed
from tokenmix.dsl.limits import MAX_INTEGER, MAX_LIST
from tokenmix.dsl.source import EmbeddedSource, Source, Span
from tokenmix.dsl.yaml_reader import YamlList, YamlMap, YamlNode, YamlScalar, read_yaml

__all__ = ["UNKNOWN", "ParameterValues", "Unknown"]


class Unknown(Exception):
    """A value depends on something that already has a finding."""


class _SpecEvaluator(Evaluator):
    """Numbers of a spec: parameters, loop variables, and `ramp(rate)` by a block's place in the model.

    Args:
        names: what each name stands for.
        place: number of the block in the row of all blocks, and their count.
        incomplete: whether a base could not be read, so that unknown names may well be its parameters.
        later: parameters that are declared but not evaluated yet.
    """

    def __init__(
        self,
        names: dict[str, Any],
        place: tuple[int, int] | None = None,
        incomplete: bool = False,
        later: Mapping[str, Any] = MappingProxyType({}),
    ):
        super().__init__(names, "this spec")
        self.place = place
        self.incomplete = incomplete
        self.later = later

    def eval_name(self, expr: syntax.Name) -> Any:
        if expr.name not in self.names:
            if self.incomplete:
                raise Unknown
            if expr.name in self.later:
                raise Mistake(
                    "TM1206", f"the parameter `{expr.name}` has no value yet here", expr.span,
                    help="a parameter can read those that are declared above it",
                )  # fmt: skip
        value = super().eval_name(expr)
        if value is UNKNOWN:
            raise Unknown
        return value

    def function(self, expr: syntax.Call, values: list[Any]) -> Any:
        if expr.callee == "ramp" and len(values) == 1:
            if self.place is None:
                raise Mistake(
                    "TM1206",
                    "ramp(rate) grows from block to block; here there is no row of blocks",
                    expr.span,
                    help="in a stage's body write ramp(rate, depths, i): the list of its layers' rates",
                )
            self._number(values[0], expr)
            rate = coerce(
                values[0],
                syntax.TypeRef(expr.span, ("rate",)),
                expr.span,
                "the last rate of `ramp`",
                self.values_of(expr),
            )
            return RampRate(rate, *self.place)
        return super().function(expr, values)


UNKNOWN = object()
_NOTHING = YamlMap(Source(SETTINGS, "").span(0, 0))  # stands for a value that has a finding


def _as_text(value: Any, depth: int = 0) -> str | None:
    """A Python value as it would be written in a spec, or None for what no spec can hold."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, numbers.Integral):
        number = int(value)
        return str(number) if abs(number) < 10**40 else f"{'-' if number < 0 else ''}{10**40}"
    if isinstance(value, numbers.Real):
        return repr(float(value)) if math.isfinite(value) else None
    if isinstance(value, str):
        return '"' + "".join(_ESCAPES.get(c, c if c.isprintable() else "?") for c in value) + '"'
    if isinstance(value, list | tuple) and depth < 3 and len(value) <= MAX_LIST:
        parts = [_as_text(v, depth + 1) for v in value]
        return None if any(p is None for p in parts) else "[" + ", ".join(p for p in parts if p) + "]"
    return None


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}


class ParameterValues:
    """The parameters of a spec, evaluated from top to bottom.

    Attributes:
        names: parameter -> value; `UNKNOWN` where it has a finding.
        settings: parameter -> the text that gives its value.
        origins: traces a number back to the text it comes from.
    """

    def __init__(self, spec: Spec, findings: list[Finding]):
        self.spec = spec
        self.findings = findings
        self.names: dict[str, Any] = {}
        self.settings: dict[str, YamlNode] = {}
        self.origins = Origins(spec, self.settings)
        self._seen = set(findings)

    def evaluator(self, names: dict[str, Any], place: tuple[int, int] | None = None) -> _SpecEvaluator:
        later = self.spec.parameters if names is self.names else {}
        return _SpecEvaluator(names, place, not self.spec.complete, later)

    def evaluate(self, overrides: Mapping[str, Any]) -> None:
        given = self._overrides(overrides)
        self._family(given)
        for name, declared in self.spec.parameters.items():
            node = given.get(name) or (self.spec.values[name][1] if name in self.spec.values else declared.default)
            value: Any = UNKNOWN
            if node is not None:
                self.settings[name] = node
            if node is not None and node is not _NOTHING:
                try:
                    value = self._checked(declared, self._given(declared, node), node)
                except Mistake as mistake:
                    self.note(mistake, node.span)
                except Unknown:
                    pass
            self.names[name] = value
        self._missing()

    def _overrides(self, overrides: Mapping[str, Any]) -> dict[str, YamlNode]:
        given: dict[str, YamlNode] = {}
        for name, value in overrides.items():
            if name not in self.spec.parameters:
                if not self.spec.complete:
                    continue
                near = nearest(name, self.spec.parameters)
                known = listed(self.spec.parameters)
                self.once(
                    Finding(
                        "TM1204",
                        f"`{self.spec.name}` has no parameter `{name}`",
                        Source(SETTINGS, name).span(0, len(name)),
                        help=f"did you mean `{near[0]}`?" if near else f"parameters: {known}" if known else "",
                    )
                )
                continue
            text = value if isinstance(value, str) else _as_text(value)
            outer = Source(SETTINGS, f"{name}=<{type(value).__name__}>" if text is None else f"{name}={text}")
            span = outer.span(len(name) + 1, len(outer.text))
            if text is None:
                what = type(value).__name__
                self.once(
                    Finding(
                        "TM1301",
                        f"`{name}` cannot be set to this {what}",
                        span,
                        help="a value is a number, word, text or list of them",
                    )
                )
                given[name] = _NOTHING
                continue
            found: list[Finding] = []
            root = read_yaml(EmbeddedSource(outer, text, [len(name) + 1]), found)
            self.findings += found
            if root is None and not found:
                self.once(Finding("TM1202", f"`{name}` is given no value", span))
            given[name] = root or _NOTHING
        return given

    def _family(self, given: dict[str, YamlNode]) -> None:
        """One finding for all parameters that a base leaves to the specs that extend it."""
        if "extends" in self.spec.root:
            return
        unset = [p for p in self.spec.parameters.values() if p.default is None and p.name not in given]
        if unset and not self.spec.guessed:
            names = ", ".join(f"`{p.name}`" for p in unset)
            self.findings.append(
                Finding(
                    "TM1205",
                    f"`{self.spec.name}` leaves {names} without a value",
                    unset[0].span,
                    help="extend it in a spec of its own that gives them under `with`, or give "
                    + " ".join(f"--set {p.name}=..." for p in unset),
                )
            )

    def _missing(self) -> None:
        """One finding for all parameters of a base that have no value."""
        if "extends" not in self.spec.root:
            return
        missing = [p for name, p in self.spec.parameters.items() if name not in self.settings]
        if not missing or self.spec.guessed:
            return
        names = [f"`{p.name}`" for p in missing]
        listing = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
        where = next(self.spec.root.key(k).span for k in ("with", "extends") if k in self.spec.root)
        notes = [Note(f"`{p.name}`{': ' if p.doc else ' is declared'}{p.doc}", p.span) for p in missing[:6]]
        self.findings.append(
            Finding(
                "TM1205",
                f"the parameters {listing} have no value"
                if len(names) > 1
                else f"the parameter {listing} has no value",
                where,
                notes=tuple(notes),
                help="under `with`, write " + ", ".join(f"{p.name}: ..." for p in missing[:6]),
            )
        )

    def _given(self, declared: ParameterDecl, node: YamlNode, entry: str = "") -> Any:
        """The value of a parameter. A word that is no name is a value of the wrong type."""
        evaluator, type_ = self.evaluator(self.names), declared.type
        if isinstance(node, YamlList):
            return tuple([self._given(declared, item, f"entry {i} of ") for i, item in enumerate(node.items)])
        if (
            isinstance(node, YamlScalar)
            and isinstance(node.value, str)
            and type_ is not None
            and type_.names[0] not in ("str", "bool")
        ):
            expr = parse_scalar(node) if len(type_.names) == 1 else None
            if (
                isinstance(expr, syntax.Name)
                and expr.name not in self.spec.parameters
                and not nearest(expr.name, self.names)
            ):
                what = f"`{declared.name}`"
                note = (Note(f"{what}: {declared.doc}" if declared.doc else f"{what} is declared", declared.span),)
                one = syntax.TypeRef(type_.span, type_.names) if entry else type_
                coerce(node.text, one, node.span, entry + what, note)
        return self.value(node, evaluator, type_)

    def value(self, node: YamlNode, evaluator: Evaluator, type_: syntax.TypeRef | None = None) -> Any:
        if isinstance(node, YamlList):
            return tuple([self.value(item, evaluator, type_) for item in node.items])
        if isinstance(node, YamlMap):
            raise Mistake("TM1301", "a value is a number, word, text or list, not a map", node.span)
        words = type_ is not None and (len(type_.names) > 1 or type_.names[0] == "str")
        if node.value is None:
            raise Mistake("TM1202", "a value is missing here", node.span)
        if isinstance(node.value, bool | int | float):
            if not abs(node.value) <= MAX_INTEGER:
                raise Mistake(
                    "TM1305", f"the number is larger than any that counts: the limit is {MAX_INTEGER:.0e}", node.span
                )
            return node.value
        if words or (type_ is None and node.style in ("'", '"')):
            return node.text
        if type_ is not None and type_.names == ("bool",) and node.text.lower() in ("yes", "no", "on", "off"):
            right = "true" if node.text.lower() in ("yes", "on") else "false"
            raise Mistake(
                "TM1301", f"`{node.text}` is a text: conditions are true or false", node.span, help=f"write `{right}`"
            )
        return evaluator.value(parse_scalar(node))

    def _checked(self, declared: ParameterDecl, value: Any, node: YamlNode) -> Any:
        what = f"`{declared.name}`"
        note = Note(
            f"`{declared.name}`: {declared.doc}" if declared.doc else f"`{declared.name}` is declared", declared.span
        )
        notes = (note,) if declared.span.source is not node.span.source or declared.doc else ()
        entries = [item.span for item in node.items] if isinstance(node, YamlList) else []
        if declared.length is not None and isinstance(value, tuple):
            whole = syntax.TypeRef(declared.length.span, ("int",))
            length = self.value(declared.length, self.evaluator(self.names), whole)
            if len(value) != length:
                raise Mistake(
                    "TM1302",
                    f"{what} has {len(value)} entr{'y' if len(value) == 1 else 'ies'} and needs {describe(length)}",
                    node.span,
                    notes=(note, Note("its length is declared", declared.length.span)),
                )
        value = coerce(value, declared.type, node.span, what, notes, entries)
        for i, number in enumerate(value if isinstance(value, tuple) else (value,)):
            for bound, wrong, word in (
                (declared.low, lambda v, b: v < b, "at least"),
                (declared.high, lambda v, b: v > b, "at most"),
            ):
                if bound is not None and isinstance(number, int | float) and wrong(number, bound.value):
                    raise Mistake(
                        "TM1302",
                        f"{what} must be {word} {bound.text}, got {describe(number)}",
                        entries[i] if i < len(entries) else node.span,
                        notes=(*notes, Note("the bound is declared", bound.span)),
                    )
        return value

    # Findings

    def note(self, mistake: Mistake, span: Span | None, names: Mapping[str, Any] | None = None) -> None:
        """Record a mistake. One in a base's text, with values that the user gave, points at the value."""
        finding = mistake.finding if mistake.finding.span else replace(mistake.finding, span=span)
        about = mistake.about
        if isinstance(about, syntax.Node) and finding.span is not None:
            places = [p for p in self.origins.places(about, self.names if names is None else names) if p.name]  # type: ignore[arg-type]
            best = next((p for p in places if p.own), None)
            if finding.span.source.name not in self.origins.own and best is not None:
                note = Note(f"read by `{finding.span.text}`", finding.span)
                finding = replace(finding, span=best.span, notes=(*finding.notes, note), label="")
            else:
                set_ = [Note(f"`{p.name}` is set", p.span) for p in places if p.span != finding.span]
                finding = replace(finding, notes=(*finding.notes, *set_))
        self.once(finding)

    def once(self, finding: Finding) -> None:
        if finding not in self._seen:
            self._seen.add(finding)
            self.findings.append(finding)
