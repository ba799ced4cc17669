"""Specs with numbers put in: which block stands where, with which hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from tokenmix.blocks.op import Op
from tokenmix.compiler.bind import default_value, is_word, match_arguments, takes
from tokenmix.compiler.blame import Origins
from tokenmix.compiler.definition import Definition, calls_in, circles
from tokenmix.compiler.library import Library
from tokenmix.compiler.spec import Spec, parse_scalar
from tokenmix.compiler.spec_reader import stage_on_top
from tokenmix.compiler.values import UNKNOWN, ParameterValues, Unknown
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import MAX_FINDINGS, Finding, Mistake, Note, nearest
from tokenmix.dsl.expressions import coerce, describe, names_in
from tokenmix.dsl.limits import MAX_LOOP, MAX_STAGES
from tokenmix.dsl.parser import parse_loop
from tokenmix.dsl.source import Span
from tokenmix.dsl.yaml_reader import YamlList, YamlMap, YamlNode, YamlScalar, corrected

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


class _Planner(ParameterValues):
    def __init__(self, spec: Spec, library: Library, findings: list[Finding], *, whole: bool):
        super().__init__(spec, findings)
        self.library = library
        self._whole = whole  # whether all that was placed so far is free of findings

    def plan(self, overrides: Mapping[str, Any]) -> Plan:
        self.evaluate(overrides)
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
            self._unborne()
        return plan

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
            self.note(mistake, node.span)
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
            self.once(
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
            self.once(
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
            self.once(finding)
        if isinstance(target, Definition):
            for finding in target.findings(self.library):
                self.once(finding)
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
        evaluator = self.evaluator(names, place)
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
                self.note(mistake, argument.span if argument else None, names)
                failed = True
            except Unknown:
                failed = True
        return None if failed else arguments

    # Stages

    def _stages(self) -> list[StagePlan]:
        node = self.spec.keys.get("stages")
        if node is None and self.spec.complete and "stages" not in self.spec.present:
            start = self.spec.root.span.start
            span = self.spec.root.span.source.span(start, start + 1)
            self.once(
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
                self.once(Finding("TM1501", f"a model has at most {MAX_STAGES:,} stages", node.items[MAX_STAGES].span))
        elif self.spec.stages is not None and node is not None:
            drafts = [(keys, names, node.span) for keys, names in self._comprehension(self.spec.stages)]
        self._single_out(drafts)
        if node is not None and not drafts and (not isinstance(node, YamlList) or not node.items):
            loop = (self.spec.stages or {}).get("for", node)
            self.once(Finding("TM1202", "the model has no stages", loop.span, help="a model has at least one stage"))
        counts = [self._repeat(keys, names) for keys, names, _ in drafts]
        total = sum(c for c in counts if c)
        if total > MAX_LOOP:
            at = next(k["repeat"] for k, _, _ in drafts if "repeat" in k)
            self.once(Finding("TM1501", f"the stages have {total:,} blocks in all, the limit is {MAX_LOOP:,}", at.span))
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
            evaluator = self.evaluator(self.names)
            whole = syntax.TypeRef(loop.span, ("int",))
            first, last = (
                coerce(evaluator.value(e), whole, e.span, "an end of the range", evaluator.values_of(e))
                for e in (start, stop)
            )
            if last - first > MAX_STAGES:
                raise Mistake("TM1501", f"{last - first:,} stages, the limit is {MAX_STAGES:,}", stop.span, about=stop)
            return [(keys, {**self.names, name: i}) for i in range(first, last)]
        except Mistake as mistake:
            self.note(mistake, loop.span)
        except Unknown:
            pass
        self._whole = False
        return [(keys, {**self.names, name: UNKNOWN})]

    def _single_out(self, drafts: list[tuple[dict[str, YamlNode], dict[str, Any], Span]]) -> None:
        """Lay what the spec says of single stages over what it says of all."""
        for number, own in self.spec.numbered.items():
            place = int(number[:9])  # a longer number is no stage either
            if place < len(drafts):
                keys, names, span = drafts[place]
                drafts[place] = (stage_on_top(keys, own), names, span)
            elif drafts and own and UNKNOWN not in drafts[0][1].values():
                last = len(drafts) - 1
                self.once(
                    Finding(
                        "TM1202",
                        f"there is no stage {number[:9]}",
                        next(iter(own.values())).span,
                        help=f"stages are numbered 0 to {last}" if last else "the model has one stage, number 0",
                    )
                )

    def _repeat(self, keys: dict[str, YamlNode], names: dict[str, Any]) -> int | None:
        node = keys.get("repeat")
        if node is None:
            blocks = keys.get("blocks")
            return len(blocks.items) if isinstance(blocks, YamlList) else 1 if blocks is not None else 0
        try:
            evaluator = self.evaluator(names)
            value = self.value(node, evaluator, syntax.TypeRef(node.span, ("int",)))
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
            self.note(mistake, node.span, names)
        except Unknown:
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
                self.once(
                    Finding(
                        "TM1201", "a stage has `blocks` and `repeat`, or `body`, not both", other.span,
                        notes=(Note("`body` is given", body.span),),
                    )
                )  # fmt: skip
            stage.body = self._site(f"stages.{i}.body", body, names)
            return stage
        if blocks is None:
            self._whole = False
            self.once(
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
            self.once(Finding("TM1202", "the list of blocks is empty", blocks.span))
            return stage
        calls: list[syntax.Call | None] = []
        for node in cycle:
            try:
                calls.append(self._call(node))
            except Mistake as mistake:
                self._whole = False
                calls.append(None)
                self.note(mistake, node.span, names)
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
            self.once(finding)
        when = node.get("when")
        if when is not None:
            try:
                wanted = self.value(when, self.evaluator(names), syntax.TypeRef(when.span, ("bool",)))
                if not isinstance(wanted, bool):
                    raise Mistake("TM1301", f"`when` is a condition, got {describe(wanted)}", when.span)
                if not wanted:
                    return None
            except Mistake as mistake:
                self._whole = False
                self.note(mistake, when.span, names)
            except Unknown:
                self._whole = False
        if "block" not in node:
            self._whole = False
            start = node.span.start
            self.once(
                Finding(
                    "TM1202",
                    "`down` has no `block`",
                    node.span.source.span(start, start + 1),
                    help="`block: conv(...)`",
                )
            )
        return self._site(name, node.get("block"), names)

    # Findings

    def _unborne(self) -> None:
        """Rules of initialisation for a label that nothing bears, in the text of this spec."""
        nodes = [node for key, node in self.spec.keys.items() if key != "stages" or self.spec.stages is None]
        nodes += list((self.spec.stages or {}).values())
        waiting = {name for node in nodes for name in _called(node)} | {d.name for d in self.library.own()}
        labels: set[str] = set()
        seen: set[str] = set()
        while waiting:
            target = self.library.find(name := waiting.pop())
            if name in seen or not isinstance(target, Definition):
                continue
            seen.add(name)
            labels |= {*target.labels.values(), *target.modules}
            waiting |= {call.callee for call in calls_in(target.block.body)}
        for label, node in self.spec.init_labels.items():
            if label not in labels and node.span.source is self.spec.source:
                near = nearest(label, labels)
                help = f"did you mean `{near[0]}`?" if near else "labels stand in front of a `:` in block definitions"
                message = f"no layer or block of this model has the label `{label}`"
                self.once(Finding("TM1207", message, node.span, help=help))

    def _unused(self) -> None:
        used: set[str] = set()
        nodes = [node for key, node in self.spec.keys.items() if key != "stages" or self.spec.stages is None]
        for stage in (self.spec.stages or {}, *self.spec.numbered.values()):
            nodes += stage.values()
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
                self.once(
                    Finding(
                        "TM1207", f"the parameter `{name}` is never used", declared.span, help="use it or leave it out"
                    )
                )


def _called(node: YamlNode) -> Iterator[str]:
    """Blocks and ops that a value of a spec names."""
    if isinstance(node, YamlList | YamlMap):
        for value in node.items if isinstance(node, YamlList) else [value for _, value in node.items]:
            yield from _called(value)
    elif isinstance(node.value, str):
        try:
            expr = parse_scalar(node)
        except Mistake:
            return  # a finding of its own
        if isinstance(expr, syntax.Call | syntax.Name):
            yield expr.callee if isinstance(expr, syntax.Call) else expr.name


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
