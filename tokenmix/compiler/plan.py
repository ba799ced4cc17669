"""Specs with numbers put in: which block stands where, with which hyperparameters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from tokenmix.blocks.op import Op
from tokenmix.compiler.bind import is_word, match_arguments
from tokenmix.compiler.definition import Definition
from tokenmix.compiler.elaborate import default_value
from tokenmix.compiler.library import Library
from tokenmix.compiler.spec import ParameterDecl, Spec, parse_scalar
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding, Mistake, Note, nearest
from tokenmix.dsl.expressions import Evaluator, RampRate, coerce, describe, names_in
from tokenmix.dsl.limits import MAX_LOOP
from tokenmix.dsl.parser import parse_loop
from tokenmix.dsl.source import Source, Span
from tokenmix.dsl.yaml_reader import YamlList, YamlMap, YamlNode, YamlScalar, read_yaml

__all__ = ["Plan", "Site", "StagePlan", "make_plan"]


@dataclass(frozen=True)
class Site:
    """A block or op placed in the model.

    Attributes:
        name: its path, such as `stages.2.blocks.5`.
        call: the call as written in the spec.
        arguments: hyperparameters by name, defaults filled in.
    """

    name: str
    call: syntax.Call
    arguments: dict[str, Any]


@dataclass
class StagePlan:
    down: Site | None = None
    blocks: list[Site] = field(default_factory=list)
    body: Site | None = None


@dataclass
class Plan:
    """What the model consists of, in order."""

    library: Library
    parameters: dict[str, Any]
    stem: Site | None
    stages: list[StagePlan]
    norms: list[Site]
    head: Site | None

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
    library = spec.library()
    findings += library.findings
    for definition in library.own():
        findings += definition.findings(library)
    plan = _Planner(spec, library, findings).plan(overrides)
    return plan if len(findings) == before else None


class _Unknown(Exception):
    """A value depends on something that already has a finding."""


class _SpecEvaluator(Evaluator):
    """Numbers of a spec: parameters, loop variables, and `ramp(rate)` by a block's place in the model."""

    def __init__(self, names: dict[str, Any], place: tuple[int, int] | None = None):
        super().__init__(names, "this spec")
        self.place = place

    def eval_name(self, expr: syntax.Name) -> Any:
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
            return RampRate(float(values[0]), *self.place)
        return super().function(expr, values)


_UNKNOWN = object()


class _Planner:
    def __init__(self, spec: Spec, library: Library, findings: list[Finding]):
        self.spec = spec
        self.library = library
        self.findings = findings
        self.names: dict[str, Any] = {}

    def plan(self, overrides: Mapping[str, Any]) -> Plan:
        self._parameters(overrides)
        stem = self._site("stem", self.spec.keys.get("stem"), self.names)
        stages = self._stages()
        norms: list[Site] = []
        features = self.spec.keys.get("features")
        if features is not None:
            for i in range(len(stages)):
                site = self._site(f"norms.{i}", features, {**self.names, "i": i})
                norms += [site] if site else []
        head = self._site("head", self.spec.keys.get("head"), self.names)
        if "stages" not in self.spec.keys:
            span = self.spec.root.span.source.span(self.spec.root.span.start, self.spec.root.span.start + 1)
            self.findings.append(Finding("TM1202", "the spec has no `stages`", span))
        self._unused()
        return Plan(self.library, dict(self.names), stem, stages, norms, head)

    # Parameters

    def _parameters(self, overrides: Mapping[str, Any]) -> None:
        given = self._overrides(overrides)
        self._family(given)
        for name, declared in self.spec.parameters.items():
            node = given.get(name) or (self.spec.values[name][1] if name in self.spec.values else declared.default)
            self.names[name] = _UNKNOWN
            if node is None:
                self._missing(declared)
                continue
            try:
                value = self._value(node, _SpecEvaluator(self.names), declared.type)
                self.names[name] = self._checked(declared, value, node.span)
            except Mistake as mistake:
                self._note(mistake, node.span)
            except _Unknown:
                pass

    def _overrides(self, overrides: Mapping[str, Any]) -> dict[str, YamlNode]:
        given: dict[str, YamlNode] = {}
        for name, value in overrides.items():
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            source = Source("<set>", f"{name}: {text}")
            if name not in self.spec.parameters:
                near = nearest(name, self.spec.parameters)
                self.findings.append(
                    Finding(
                        "TM1204",
                        f"`{self.spec.name}` has no parameter `{name}`",
                        source.span(0, len(name)),
                        help=f"did you mean `{near[0]}`?" if near else f"parameters: {', '.join(self.spec.parameters)}",
                    )
                )
                continue
            root = read_yaml(source, self.findings)
            if isinstance(root, YamlMap):
                given[name] = root.items[0][1]
        return given

    def _family(self, given: dict[str, YamlNode]) -> None:
        """One finding for all parameters that a base leaves to the specs that extend it."""
        if "extends" in self.spec.root:
            return
        unset = [p for p in self.spec.parameters.values() if p.default is None and p.name not in given]
        if unset:
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

    def _missing(self, declared: ParameterDecl) -> None:
        base = declared.span.source.name
        where = next((self.spec.root.key(k).span for k in ("with", "extends", "name") if k in self.spec.root), None)
        own = base == self.spec.source.name
        if "extends" not in self.spec.root:
            return
        self.findings.append(
            Finding(
                "TM1205",
                f"the parameter `{declared.name}` has no value",
                declared.span if own or where is None else where,
                notes=() if own else (Note(f"`{declared.name}` is declared", declared.span),),
                help=f"`{declared.name}` is {declared.doc}" if declared.doc else f"add `{declared.name}: ...` under `with`",
            )
        )

    def _value(self, node: YamlNode, evaluator: Evaluator, type_: syntax.TypeRef | None = None) -> Any:
        if isinstance(node, YamlList):
            return tuple(self._value(item, evaluator, type_) for item in node.items)
        if isinstance(node, YamlMap):
            raise Mistake("TM1301", "a value is a number, word, text or list, not a map", node.span)
        words = type_ is not None and (len(type_.names) > 1 or type_.names[0] == "str")
        if isinstance(node.value, bool | int | float):
            return node.value
        if words or type_ is None and node.style in ("'", '"'):
            return node.text
        expr = parse_scalar(node)
        return evaluator.value(expr)

    def _checked(self, declared: ParameterDecl, value: Any, span: Span) -> Any:
        what = f"`{declared.name}`"
        note = (Note(f"`{declared.name}`: {declared.doc}", declared.span),) if declared.doc else ()
        value = coerce(value, declared.type, span, what, note)
        for number in value if isinstance(value, tuple) else (value,):
            for bound, wrong, word in (
                (declared.low, lambda v, b: v < b, "at least"),
                (declared.high, lambda v, b: v > b, "at most"),
            ):
                if bound is not None and isinstance(number, int | float) and wrong(number, bound.value):
                    raise Mistake(
                        "TM1302", f"{what} is {word} {bound.text}, got {describe(number)}", span,
                        notes=(Note("the bound stands", bound.span),),
                    )  # fmt: skip
        if declared.length is not None:
            length = self._value(declared.length, _SpecEvaluator(self.names))
            if not isinstance(value, tuple) or len(value) != length:
                given = f"{len(value)} entries" if isinstance(value, tuple) else describe(value)
                raise Mistake(
                    "TM1302", f"{what} is a list of {length}, got {given}", span,
                    notes=(Note("the length stands", declared.length.span),),
                )  # fmt: skip
        return value

    # Blocks

    def _site(
        self, name: str, node: YamlNode | None, names: dict[str, Any], place: tuple[int, int] | None = None
    ) -> Site | None:
        if node is None or isinstance(node, YamlScalar) and node.value is None:
            return None
        try:
            call = self._call(node, name.split(".")[0] if "." not in name else name.split(".")[-1])
        except Mistake as mistake:
            self._note(mistake, node.span)
            return None
        return self._bound(name, call, names, place)

    def _call(self, node: YamlNode, what: str) -> syntax.Call:
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

    def _bound(
        self, name: str, call: syntax.Call, names: dict[str, Any], place: tuple[int, int] | None
    ) -> Site | None:
        target = self.library.find(call.callee)
        if target is None:
            near = nearest(call.callee, self.library.names())
            self._once(
                Finding(
                    "TM1203",
                    f"no block or op is called `{call.callee}`",
                    call.callee_span,
                    label=f"known with a near name: {', '.join(near)}" if near else "",
                    help=f"write `{near[0]}`, or list all with `tokenmix list`" if near else "list all with `tokenmix list`",
                )
            )
            return None
        positional = [a for a in call.tensors + call.arguments if not a.name]
        if positional:
            self._once(
                Finding(
                    "TM1306",
                    "in a spec every argument is named",
                    positional[0].span,
                    help=f"write `{target.signature.parameters[0].name if target.signature.parameters else '...'}="
                    f"{positional[0].span.text}`",
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
            return None
        return Site(name, call, arguments)

    def _arguments(
        self,
        target: Definition | Op,
        matched: dict[str, syntax.Argument],
        names: dict[str, Any],
        place: tuple[int, int] | None,
    ) -> dict[str, Any] | None:
        evaluator = _SpecEvaluator(names, place)
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
                notes = (*evaluator.values_of(expr), *self._origins(expr))
                what = f"`{parameter.name}` of `{target.name}`"
                arguments[parameter.name] = coerce(value, parameter.type, expr.span, what, notes)
            except Mistake as mistake:
                self._note(mistake, argument.span if argument else None)
                failed = True
            except _Unknown:
                failed = True
        return None if failed else arguments

    def _origins(self, expr: syntax.Expr) -> tuple[Note, ...]:
        """Where the parameters that an expression reads got their values."""
        notes = []
        for name in sorted(names_in(expr) & self.spec.values.keys()):
            notes.append(Note(f"`{name}` is set", self.spec.values[name][0].key(name).span))
        return tuple(notes)

    # Stages

    def _stages(self) -> list[StagePlan]:
        node = self.spec.keys.get("stages")
        drafts: list[tuple[dict[str, YamlNode], dict[str, Any]]] = []
        if isinstance(node, YamlList):
            drafts = [
                ({k.text: v for k, v in item.items}, {**self.names, "i": i})
                for i, item in enumerate(node.items)
                if isinstance(item, YamlMap)
            ]
        elif self.spec.stages is not None:
            drafts = self._comprehension(self.spec.stages, node)
        counts = [self._repeat(keys, names) for keys, names in drafts]
        total = sum(c for c in counts if c)
        place = count()
        stages = []
        for i, ((keys, names), repeat) in enumerate(zip(drafts, counts, strict=True)):
            stages.append(self._stage(i, keys, names, repeat, total, place))
        return stages

    def _comprehension(
        self, keys: dict[str, YamlNode], node: YamlNode | None
    ) -> list[tuple[dict[str, YamlNode], dict[str, Any]]]:
        loop = keys.get("for")
        if loop is None:
            return [(keys, {**self.names, "i": 0})]
        try:
            if not isinstance(loop, YamlScalar):
                raise Mistake("TM1301", "`for` is a variable and its range, `i in 0..4`", loop.span)
            variable, start, stop = parse_loop(loop.source)
            if variable.name in self.names:
                raise Mistake("TM1208", f"`{variable.name}` is already a parameter", variable.span)
            evaluator = _SpecEvaluator(self.names)
            whole = syntax.TypeRef(loop.span, ("int",))
            first, last = (coerce(evaluator.value(e), whole, e.span, "an end of the range") for e in (start, stop))
            if last - first > MAX_LOOP:
                raise Mistake("TM1501", f"{last - first} stages, the limit is {MAX_LOOP}", stop.span)
            return [(keys, {**self.names, variable.name: i}) for i in range(first, last)]
        except Mistake as mistake:
            self._note(mistake, loop.span)
        except _Unknown:
            pass
        return []

    def _repeat(self, keys: dict[str, YamlNode], names: dict[str, Any]) -> int | None:
        node = keys.get("repeat")
        if node is None:
            return 1 if "blocks" in keys else 0
        try:
            value = self._value(node, _SpecEvaluator(names))
            number = coerce(value, syntax.TypeRef(node.span, ("int",)), node.span, "`repeat`")
            if not 0 <= number <= MAX_LOOP:
                raise Mistake("TM1501", f"`repeat` is at most {MAX_LOOP} and not negative, got {number}", node.span)
            return number
        except Mistake as mistake:
            self._note(mistake, node.span)
        except _Unknown:
            pass
        return None

    def _stage(
        self, i: int, keys: dict[str, YamlNode], names: dict[str, Any], repeat: int | None, total: int, place: count
    ) -> StagePlan:
        stage = StagePlan(down=self._down(f"stages.{i}.down", keys.get("down"), names))
        body, blocks = keys.get("body"), keys.get("blocks")
        if body is not None:
            if blocks is not None or "repeat" in keys:
                other = blocks if blocks is not None else keys["repeat"]
                self._once(Finding("TM1201", "a stage has `blocks` and `repeat`, or `body`, not both", other.span))
            stage.body = self._site(f"stages.{i}.body", body, names)
            return stage
        if blocks is None:
            span = next(iter(keys.values())).span if keys else self.spec.root.span
            self._once(Finding("TM1202", "the stage has neither `blocks` nor `body`", span))
            return stage
        cycle = blocks.items if isinstance(blocks, YamlList) else (blocks,)
        if not cycle:
            self._once(Finding("TM1202", "the list of blocks is empty", blocks.span))
            return stage
        try:
            calls = [self._call(node, "blocks") for node in cycle]
        except Mistake as mistake:
            self._note(mistake, blocks.span)
            return stage
        for j in range(repeat or 0):
            site = self._bound(f"stages.{i}.blocks.{j}", calls[j % len(calls)], {**names, "j": j}, (next(place), total))
            if site is None:
                break
            stage.blocks.append(site)
        return stage

    def _down(self, name: str, node: YamlNode | None, names: dict[str, Any]) -> Site | None:
        if not isinstance(node, YamlMap):
            return self._site(name, node, names)
        for key, _ in node.items:
            if key.text not in ("when", "block"):
                near = nearest(key.text, ("when", "block"))
                self._once(
                    Finding(
                        "TM1201", f"`down` has no key `{key.text}`", key.span,
                        help=f"did you mean `{near[0]}`?" if near else "keys: when, block",
                    )
                )  # fmt: skip
        when = node.get("when")
        if when is not None:
            try:
                wanted = self._value(when, _SpecEvaluator(names))
                if not isinstance(wanted, bool):
                    raise Mistake("TM1301", f"`when` is a condition, got {describe(wanted)}", when.span)
                if not wanted:
                    return None
            except Mistake as mistake:
                self._note(mistake, when.span)
                return None
            except _Unknown:
                return None
        if "block" not in node:
            self._once(Finding("TM1202", "`down` has no `block`", node.span))
        return self._site(name, node.get("block"), names)

    # Findings

    def _note(self, mistake: Mistake, span: Span | None) -> None:
        finding = mistake.finding
        self._once(finding if finding.span else replace(finding, span=span))

    def _once(self, finding: Finding) -> None:
        if finding not in self.findings:
            self.findings.append(finding)

    def _unused(self) -> None:
        used: set[str] = set()
        nodes = [node for key, node in self.spec.keys.items() if key != "stages" or self.spec.stages is None]
        nodes += list((self.spec.stages or {}).values())
        nodes += [n for p in self.spec.parameters.values() for n in (p.default, p.length) if n is not None]
        nodes += [node for _, node in self.spec.values.values()]
        if not all(_collect_names(node, used) for node in nodes):
            return  # what cannot be read may well use it
        for name, declared in self.spec.parameters.items():
            if name not in used:
                self._once(
                    Finding("TM1207", f"the parameter `{name}` is never used", declared.span, help="use it or leave it out")
                )


def _collect_names(node: YamlNode, names: set[str]) -> bool:
    """Names that the expressions below a node read; False if one of them cannot be parsed."""
    if isinstance(node, YamlList):
        return all([_collect_names(item, names) for item in node.items])
    if isinstance(node, YamlMap):
        return all([_collect_names(value, names) for _, value in node.items])
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
        return node.style in ("'", '"')
    return True
