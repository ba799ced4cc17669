"""Specs with numbers put in: which block stands where, with which hyperparameters."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from types import MappingProxyType
from typing import Any

from tokenmix.blocks.op import Op
from tokenmix.compiler.bind import default_value, is_word, match_arguments, takes
from tokenmix.compiler.blame import SETTINGS, Origins
from tokenmix.compiler.definition import Definition, circles
from tokenmix.compiler.library import Library
from tokenmix.compiler.spec import ParameterDecl, Spec, parse_scalar
from tokenmix.compiler.spec_reader import corrected
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import MAX_FINDINGS, Finding, Mistake, Note, nearest
from tokenmix.dsl.expressions import Evaluator, RampRate, coerce, describe, listed, names_in
from tokenmix.dsl.limits import MAX_INTEGER, MAX_LIST, MAX_LOOP, MAX_STAGES
from tokenmix.dsl.parser import parse_loop
from tokenmix.dsl.source import EmbeddedSource, Source, Span
from tokenmix.dsl.yaml_reader import YamlList, YamlMap, YamlNode, YamlScalar, read_yaml

__all__ = ["Plan", "Site", "StagePlan", "make_plan"]


@dataclass(frozen=True)
class Site:
    """A block or op placed in the model.

    Attributes:
        name: its path, such as `stages.2.blocks.5`.
        call: the call as written in the spec.
        arguments: hyperparameters by name, defaults filled in.
        names: what the names in the call stand for.
    """

    name: str
    call: syntax.Call
    arguments: dict[str, Any]
    names: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass
class StagePlan:
    down: Site | None = None
    blocks: list[Site] = field(default_factory=list)
    body: Site | None = None
    whole: bool = True  # False in a draft: the stage, or one before it, has a finding


@dataclass
class Plan:
    """What the model consists of, in order."""

    library: Library
    parameters: dict[str, Any]
    stem: Site | None
    stages: list[StagePlan]
    norms: list[Site]
    head: Site | None
    origins: Origins

    @property
    def own(self) -> frozenset[str]:
        """Names of the sources that the user wrote, bases left out."""
        return self.origins.own

    def trunk(self) -> list[Site]:
        """Stem and stages in the order in which they run."""
        sites = [self.stem] if self.stem else []
        for stage in self.stages:
            sites += [stage.down] if stage.down else []
            sites += stage.blocks
            sites += [stage.body] if stage.body else []
        return sites


def make_plan(spec: Spec, overrides: Mapping[str, Any], findings: list[Finding]) -> Plan | None:
    """Evaluate a spec, with `overrides` (texts or Python values) on top of what it says. None where findings forbid."""
    before = len(findings)
    plan = make_draft(spec, overrides, findings)
    return plan if len(findings) == before else None


def make_draft(spec: Spec, overrides: Mapping[str, Any], findings: list[Finding]) -> Plan:
    """The plan as far as it goes: up to the first block that has a finding, and to look for more findings only."""
    library = spec.library()
    findings += library.findings
    for definition in library.own():
        if len(findings) < 2 * MAX_FINDINGS:
            findings += definition.findings(library)
    endless = circles(library)
    findings += endless
    return _Planner(spec, library, findings, whole=not endless).plan(overrides)


class _Unknown(Exception):
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
                raise _Unknown
            if expr.name in self.later:
                raise Mistake(
                    "TM1206", f"the parameter `{expr.name}` has no value yet here", expr.span,
                    help="a parameter can read those that are declared above it",
                )  # fmt: skip
        value = super().eval_name(expr)
        if value is _UNKNOWN:
            raise _Unknown
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


_UNKNOWN = object()
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


class _Planner:
    def __init__(self, spec: Spec, library: Library, findings: list[Finding], *, whole: bool):
        self.spec = spec
        self.library = library
        self.findings = findings
        self.names: dict[str, Any] = {}
        self.settings: dict[str, YamlNode] = {}
        self.origins = Origins(spec, self.settings)
        self._seen = set(findings)
        self._whole = whole  # whether all that was placed so far is free of findings

    def plan(self, overrides: Mapping[str, Any]) -> Plan:
        self._parameters(overrides)
        plan = Plan(self.library, self.names, None, [], [], None, self.origins)
        plan.stem = self._site("stem", self.spec.keys.get("stem"), self.names)
        stages = self._stages()
        whole = self._whole
        features = self.spec.keys.get("features")
        if features is not None:
            for i in range(len(stages)):
                site = self._site(f"norms.{i}", features, {**self.names, "i": i})
                plan.norms += [site] if site else []
        self._whole = whole
        head = self._site("head", self.spec.keys.get("head"), self.names)
        plan.stages = [stage for stage in stages if stage.whole]
        plan.head = head if self._whole else None
        if self.spec.complete:
            self._unused()
        return plan

    def _evaluator(self, names: dict[str, Any], place: tuple[int, int] | None = None) -> _SpecEvaluator:
        later = self.spec.parameters if names is self.names else {}
        return _SpecEvaluator(names, place, not self.spec.complete, later)

    # Parameters

    def _parameters(self, overrides: Mapping[str, Any]) -> None:
        given = self._overrides(overrides)
        self._family(given)
        for name, declared in self.spec.parameters.items():
            node = given.get(name) or (self.spec.values[name][1] if name in self.spec.values else declared.default)
            value: Any = _UNKNOWN
            if node is not None:
                self.settings[name] = node
            if node is not None and node is not _NOTHING:
                try:
                    value = self._checked(declared, self._given(declared, node), node)
                except Mistake as mistake:
                    self._note(mistake, node.span)
                except _Unknown:
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
                self._once(
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
                self._once(
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
                self._once(Finding("TM1202", f"`{name}` is given no value", span))
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
        evaluator, type_ = self._evaluator(self.names), declared.type
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
        return self._value(node, evaluator, type_)

    def _value(self, node: YamlNode, evaluator: Evaluator, type_: syntax.TypeRef | None = None) -> Any:
        if isinstance(node, YamlList):
            return tuple([self._value(item, evaluator, type_) for item in node.items])
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
            length = self._value(declared.length, self._evaluator(self.names), whole)
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

    # Blocks

    def _site(
        self, name: str, node: YamlNode | None, names: dict[str, Any], place: tuple[int, int] | None = None
    ) -> Site | None:
        if node is None or (isinstance(node, YamlScalar) and node.value is None and node.text):
            return None  # `null` takes away what a base has there
        try:
            call = self._call(node)
        except Mistake as mistake:
            self._whole = False
            self._note(mistake, node.span)
            return None
        return self._bound(name, call, names, place)

    def _call(self, node: YamlNode) -> syntax.Call:
        if isinstance(node, YamlScalar) and node.value is None:
            raise Mistake("TM1202", "a block is missing here", node.span, help="name one, or write `null` for none")
        if not isinstance(node, YamlScalar):
            raise Mistake("TM1301", "a block is called here, such as `mlp(expand=4)`", node.span)
        expr = parse_scalar(node)
        if isinstance(expr, syntax.Name) and not expr.dim:
            expr = syntax.Call(expr.span, expr.name, expr.span, bare=True)
        if not isinstance(expr, syntax.Call):
            help = "define a block with the pipe under `definitions`" if isinstance(expr, syntax.Pipe) else ""
            raise Mistake("TM1301", "a block is called here, such as `mlp(expand=4)`", expr.span, help=help)
        if expr.label:
            raise Mistake("TM1301", "blocks of a spec are named by their place and have no label", expr.span)
        return expr

    def _bound(self, name: str, call: syntax.Call, names: dict[str, Any], place: tuple[int, int] | None) -> Site | None:
        target = self.library.find(call.callee)
        if target is None:
            self._whole = False
            if self.library.may_hold(call.callee):
                return None
            near = nearest(call.callee, self.library.names())
            self._once(
                Finding(
                    "TM1203",
                    f"no block or op is called `{call.callee}`",
                    call.callee_span,
                    label=f"known with a near name: {', '.join(near)}" if near else "",
                    help=f"write `{near[0]}`, or list all with `tokenmix list`"
                    if near
                    else "list all with `tokenmix list`",
                )
            )
            return None
        positional = next((a for a in call.tensors + call.arguments if not a.name), None)
        if positional is not None:
            self._whole = False
            parameters = [p.name for p in target.signature.parameters]
            first = parameters[0] if parameters else ""
            self._once(
                Finding(
                    "TM1306",
                    "in a spec every argument is named",
                    positional.span,
                    help=f"write `{first}={positional.span.text}`; {takes(target.signature)}"
                    if first
                    else takes(target.signature),
                )
            )
            return None
        matched, findings = match_arguments(target.signature, call.arguments, call)
        for finding in findings:
            self._once(finding)
        if isinstance(target, Definition):
            for finding in target.findings(self.library):
                self._once(finding)
        arguments = self._arguments(target, matched, names, place)
        if findings or arguments is None:
            self._whole = False
            return None
        return Site(name, call, arguments, names)

    def _arguments(
        self,
        target: Definition | Op,
        matched: dict[str, syntax.Argument],
        names: dict[str, Any],
        place: tuple[int, int] | None,
    ) -> dict[str, Any] | None:
        evaluator = self._evaluator(names, place)
        arguments: dict[str, Any] = {}
        failed = False
        for parameter in target.signature.parameters:
            argument = matched.get(parameter.name)
            try:
                if argument is None:
                    if parameter.default is not None:
                        arguments[parameter.name] = default_value(parameter, target.name)
                    continue
                expr = argument.value
                value = expr.name if is_word(parameter, expr, names) else evaluator.value(expr)  # type: ignore[union-attr]
                what = f"`{parameter.name}` of `{target.name}`"
                try:
                    arguments[parameter.name] = coerce(value, parameter.type, expr.span, what)
                except Mistake as mistake:
                    mistake.finding = replace(mistake.finding, notes=evaluator.values_of(expr))
                    mistake.about = expr
                    raise
            except Mistake as mistake:
                self._note(mistake, argument.span if argument else None, names)
                failed = True
            except _Unknown:
                failed = True
        return None if failed else arguments

    # Stages

    def _stages(self) -> list[StagePlan]:
        node = self.spec.keys.get("stages")
        if node is None and self.spec.complete and "stages" not in self.spec.present:
            start = self.spec.root.span.start
            span = self.spec.root.span.source.span(start, start + 1)
            self._once(
                Finding(
                    "TM1202",
                    "the spec has no `stages`",
                    span,
                    help="`stages:` with a list of stages, or `extends: ...`",
                )
            )
        drafts: list[tuple[dict[str, YamlNode], dict[str, Any], Span]] = []
        if isinstance(node, YamlList):
            drafts = [
                ({k.text: v for k, v in item.items}, {**self.names, "i": i}, item.span)
                for i, item in enumerate(node.items[:MAX_STAGES])
                if isinstance(item, YamlMap)
            ]
            if len(node.items) > MAX_STAGES:
                self._once(Finding("TM1501", f"a model has at most {MAX_STAGES:,} stages", node.items[MAX_STAGES].span))
        elif self.spec.stages is not None and node is not None:
            drafts = [(keys, names, node.span) for keys, names in self._comprehension(self.spec.stages)]
        if node is not None and not drafts and (not isinstance(node, YamlList) or not node.items):
            loop = (self.spec.stages or {}).get("for", node)
            self._once(Finding("TM1202", "the model has no stages", loop.span, help="a model has at least one stage"))
        counts = [self._repeat(keys, names) for keys, names, _ in drafts]
        total = sum(c for c in counts if c)
        if total > MAX_LOOP:
            at = next(k["repeat"] for k, _, _ in drafts if "repeat" in k)
            self._once(
                Finding("TM1501", f"the stages have {total:,} blocks in all, the limit is {MAX_LOOP:,}", at.span)
            )
            counts = [None] * len(counts)
        place = count()
        stages = []
        for i, ((keys, names, span), repeat) in enumerate(zip(drafts, counts, strict=True)):
            stages.append(self._stage(i, keys, names, repeat, total, place, span))
            stages[-1].whole = self._whole
        return stages

    def _comprehension(self, keys: dict[str, YamlNode]) -> list[tuple[dict[str, YamlNode], dict[str, Any]]]:
        loop = keys.get("for")
        if loop is None:
            return [(keys, {**self.names, "i": 0})]
        name = "i"
        try:
            if not isinstance(loop, YamlScalar) or loop.value is None:
                raise Mistake("TM1301", "`for` is a variable and its range, `i in 0..4`", loop.span)
            variable, start, stop = parse_loop(loop.source)
            name = variable.name
            if name in self.names:
                raise Mistake("TM1208", f"`{name}` is already a parameter", variable.span, help="choose another name")
            evaluator = self._evaluator(self.names)
            whole = syntax.TypeRef(loop.span, ("int",))
            first, last = (
                coerce(evaluator.value(e), whole, e.span, "an end of the range", evaluator.values_of(e))
                for e in (start, stop)
            )
            if last - first > MAX_STAGES:
                raise Mistake("TM1501", f"{last - first:,} stages, the limit is {MAX_STAGES:,}", stop.span, about=stop)
            return [(keys, {**self.names, name: i}) for i in range(first, last)]
        except Mistake as mistake:
            self._note(mistake, loop.span)
        except _Unknown:
            pass
        self._whole = False
        return [(keys, {**self.names, name: _UNKNOWN})]

    def _repeat(self, keys: dict[str, YamlNode], names: dict[str, Any]) -> int | None:
        node = keys.get("repeat")
        if node is None:
            blocks = keys.get("blocks")
            return len(blocks.items) if isinstance(blocks, YamlList) else 1 if blocks is not None else 0
        try:
            evaluator = self._evaluator(names)
            value = self._value(node, evaluator, syntax.TypeRef(node.span, ("int",)))
            expr = parse_scalar(node) if isinstance(node, YamlScalar) else None
            notes = evaluator.values_of(expr) if expr else ()
            try:
                number = coerce(value, syntax.TypeRef(node.span, ("int",)), node.span, "`repeat`", notes)
                if number < 0:
                    raise Mistake("TM1302", f"`repeat` must not be negative, got {number}", node.span, notes=notes)
                if number > MAX_LOOP:
                    raise Mistake(
                        "TM1501", f"`repeat` is {number:,}, the limit is {MAX_LOOP:,} blocks", node.span, notes=notes
                    )
            except Mistake as mistake:
                mistake.about = expr
                raise
            return number
        except Mistake as mistake:
            self._note(mistake, node.span, names)
        except _Unknown:
            pass
        return None

    def _stage(
        self,
        i: int,
        keys: dict[str, YamlNode],
        names: dict[str, Any],
        repeat: int | None,
        total: int,
        place: count,
        span: Span,
    ) -> StagePlan:
        stage = StagePlan(down=self._down(f"stages.{i}.down", keys.get("down"), names))
        body, blocks = keys.get("body"), keys.get("blocks")
        if body is not None:
            if blocks is not None or "repeat" in keys:
                other = blocks if blocks is not None else keys["repeat"]
                self._once(
                    Finding(
                        "TM1201", "a stage has `blocks` and `repeat`, or `body`, not both", other.span,
                        notes=(Note("`body` is given", body.span),),
                    )
                )  # fmt: skip
            stage.body = self._site(f"stages.{i}.body", body, names)
            return stage
        if blocks is None:
            self._whole = False
            self._once(
                Finding(
                    "TM1202",
                    "the stage has neither `blocks` nor `body`",
                    span.source.span(span.start, span.start + 1),
                    help="`blocks: mlp(expand=4)`",
                )
            )
            return stage
        cycle = blocks.items if isinstance(blocks, YamlList) else (blocks,)
        if not cycle:
            self._whole = False
            self._once(Finding("TM1202", "the list of blocks is empty", blocks.span))
            return stage
        calls: list[syntax.Call | None] = []
        for node in cycle:
            try:
                calls.append(self._call(node))
            except Mistake as mistake:
                self._whole = False
                calls.append(None)
                self._note(mistake, node.span, names)
        failed: set[int] = set()
        rounds = len(calls) if repeat is None else repeat
        self._whole &= repeat is not None
        for j in range(rounds):
            number, call = (next(place), total) if repeat is not None else (0, 1), calls[j % len(calls)]
            if call is None or j % len(calls) in failed:
                continue
            site = self._bound(f"stages.{i}.blocks.{j}", call, {**names, "j": j}, number)
            if site is None:
                failed.add(j % len(calls))
            else:
                stage.blocks.append(site)
        return stage

    def _down(self, name: str, node: YamlNode | None, names: dict[str, Any]) -> Site | None:
        if not isinstance(node, YamlMap):
            return self._site(name, node, names)
        found: list[Finding] = []
        node = corrected(node, ("when", "block"), "`down`", found)
        for finding in found:
            self._once(finding)
        when = node.get("when")
        if when is not None:
            try:
                wanted = self._value(when, self._evaluator(names), syntax.TypeRef(when.span, ("bool",)))
                if not isinstance(wanted, bool):
                    raise Mistake("TM1301", f"`when` is a condition, got {describe(wanted)}", when.span)
                if not wanted:
                    return None
            except Mistake as mistake:
                self._whole = False
                self._note(mistake, when.span, names)
            except _Unknown:
                self._whole = False
        if "block" not in node:
            self._whole = False
            start = node.span.start
            self._once(
                Finding(
                    "TM1202",
                    "`down` has no `block`",
                    node.span.source.span(start, start + 1),
                    help="`block: conv(...)`",
                )
            )
        return self._site(name, node.get("block"), names)

    # Findings

    def _note(self, mistake: Mistake, span: Span | None, names: Mapping[str, Any] | None = None) -> None:
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
        self._once(finding)

    def _once(self, finding: Finding) -> None:
        if finding not in self._seen:
            self._seen.add(finding)
            self.findings.append(finding)

    def _unused(self) -> None:
        used: set[str] = set()
        nodes = [node for key, node in self.spec.keys.items() if key != "stages" or self.spec.stages is None]
        nodes += list((self.spec.stages or {}).values())
        values = [n for p in self.spec.parameters.values() for n in (p.default, p.length) if n is not None]
        values += [node for _, node in self.spec.values.values()]
        readable = [_collect_names(node, used) for node in nodes] + [
            _collect_names(n, used, texts=True) for n in values
        ]
        if not all(readable):
            return  # what cannot be read may well use it
        for name, declared in self.spec.parameters.items():
            # What a variant leaves unused of its base is the base's to use.
            if name not in used and declared.span.source is self.spec.source:
                self._once(
                    Finding(
                        "TM1207", f"the parameter `{name}` is never used", declared.span, help="use it or leave it out"
                    )
                )


def _collect_names(node: YamlNode, names: set[str], *, texts: bool = False) -> bool:
    """Names that the expressions below a node read; False if one of them cannot be parsed.

    Args:
        node: a value, list or map of a spec.
        names: takes the names.
        texts: whether what stands in quotes may be a plain text.
    """
    if isinstance(node, YamlList | YamlMap):
        values = node.items if isinstance(node, YamlList) else [value for _, value in node.items]
        return min([_collect_names(value, names, texts=texts) for value in values], default=True)
    if not isinstance(node.value, str):
        return True
    try:
        if re.match(r"\s*\w+\s+in\s", node.text):
            _, start, stop = parse_loop(node.source)
            names |= names_in(start) | names_in(stop)
        else:
            expr = parse_scalar(node)
            calls = [expr] if isinstance(expr, syntax.Call) else []
            names |= names_in(expr).union(*(names_in(a.value) for c in calls for a in c.tensors + c.arguments))
    except Mistake:
        return texts and node.style in ("'", '"')
    return True
