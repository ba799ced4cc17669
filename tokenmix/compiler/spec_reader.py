"""Reading specs: YAML checked against the keys a spec has, bases folded in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenmix.blocks.cost import CONVENTIONS, TALLIES, Convention
from tokenmix.compiler.spec import (
    DISTRIBUTIONS,
    INIT_KEYS,
    PARAMETER_KEYS,
    PUBLISHED_KEYS,
    SOURCE_KEYS,
    STAGE_KEYS,
    STATUS_KEYS,
    UNITS,
    Exact,
    ParameterDecl,
    Published,
    Spec,
    Status,
    parse_scalar,
    printed_number,
    shipped_specs,
)
from tokenmix.compiler.spec_chain import real_path, spec_chain
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding, Mistake, nearest
from tokenmix.dsl.expressions import TYPES, Evaluator, describe, listed
from tokenmix.dsl.limits import MAX_INTEGER, MAX_ROWS
from tokenmix.dsl.parser import is_name
from tokenmix.dsl.source import Source, Span
from tokenmix.dsl.yaml_reader import YamlList, YamlMap, YamlNode, YamlScalar, corrected

__all__ = ["read_spec", "stage_on_top"]


def read_spec(path: Path, findings: list[Finding]) -> Spec | None:
    """The spec in a file with everything it extends, or None; mistakes go to `findings`."""
    chain, complete = spec_chain(path, findings)
    if not chain:
        return None
    source, root = chain[0]
    spec = Spec(source.folder.joinpath(source.name).stem, source, root, complete=complete)
    shipped = {real_path(p.parent) for p in shipped_specs().values()}
    if any(real_path(s.folder) not in shipped for s, _ in chain):
        spec.folder = source.folder
    for text, base in reversed(chain):
        _Reader(spec, text, findings).fold(base, own=base is root)
    spec.bases = [s for s, _ in chain[1:]]
    return spec


def stage_on_top(stage: Mapping[str, YamlNode], top: YamlMap | Mapping[str, YamlNode]) -> dict[str, YamlNode]:
    """Keys of a stage with others laid over them; `blocks` and `repeat` give way to a `body`, and the reverse."""
    new = {key.text: value for key, value in top.items} if isinstance(top, YamlMap) else top
    gone = {"blocks", "repeat"} if "body" in new else {"body"} if "blocks" in new else set()
    return {**{key: value for key, value in stage.items() if key not in gone}, **new}


class _Reader:
    """Folds one YAML document into a spec that already holds its bases."""

    def __init__(self, spec: Spec, source: Source, findings: list[Finding]):
        self.spec = spec
        self.source = source
        self.findings = findings

    def _add(self, id: str, message: str, span: Span | None, **details: Any) -> None:
        self.findings.append(Finding(id, message, span, **details))

    def fold(self, root: YamlMap, *, own: bool) -> None:
        self._version(root)
        spec = self.spec
        spec.present |= {key.text for key, _ in root.items}
        for key in ("stem", "head", "features"):
            if key in root:
                node = root.get(key)
                assert node is not None
                spec.keys[key] = node
        name = self._text(root.get("name"), "name")
        if own and name is not None:
            node = root.get("name")
            if is_name(name):
                spec.name = name
            else:
                self._add("TM1211", f"`{name}` cannot be the name of a model", node.span if node else None, help=_NAMES)
        elif own and "name" not in root:
            start = root.span.start
            self._add(
                "TM1202", "the spec has no `name`", root.span.source.span(start, start + 1), help="`name: my_model`"
            )
        if "with" in root and "extends" not in root:
            spec.present.add("stages")  # most likely the base's
            self._add(
                "TM1201", "`with` gives values to the parameters of an extended spec, and this one extends none",
                root.key("with").span, help="add `extends: ...`, or give the values under `parameters`",
            )  # fmt: skip
        elif "with" in root:
            self._with(root.get("with"))
        if "parameters" in root:
            self._parameters(root.get("parameters"))
        if "stages" in root:
            self._stages(root.get("stages"))
        if "source" in root:
            self._paper(root.get("source"))
        spec.doc = self._text(root.get("doc"), "doc") or spec.doc
        if "input" in root:
            node = root.get("input")
            spec.input, spec.input_span = self._input(node), node.span if node else None
        if "init" in root:
            self._init(root.get("init"))
        if "definitions" in root:
            node = root.get("definitions")
            if isinstance(node, YamlScalar) and isinstance(node.value, str):
                spec.definitions.insert(0, node.source)
            else:
                self._add(
                    "TM1301", "`definitions` is a text in the block language", root.key("definitions").span,
                    help="`definitions: |`, and the blocks indented below it",
                )  # fmt: skip
        if "layouts" in root:
            self._layouts(root.get("layouts"))
        if "conventions" in root:
            self._conventions(root.get("conventions"))
        if "flops_rule" in root:
            spec.flops_rule = self._rule(root.get("flops_rule")) or spec.flops_rule
        if own:
            self._figures(root)

    def _version(self, root: YamlMap) -> None:
        node = root.get("tokenmix")
        if node is None:
            self._add(
                "TM1202", "the spec does not say which language version it is written in",
                root.span.source.span(root.span.start, root.span.start + 1), help="begin with `tokenmix: 1`",
            )  # fmt: skip
        elif not isinstance(node, YamlScalar) or node.value != 1 or isinstance(node.value, bool):
            self._add("TM1302", "this version of tokenmix reads language version 1", node.span, help="`tokenmix: 1`")

    def _map(self, node: YamlNode | None, what: str) -> YamlMap | None:
        if isinstance(node, YamlMap):
            return node
        if node is not None:
            self._add("TM1301", f"{what} is a map of keys and values", node.span)
        return None

    def _text(self, node: YamlNode | None, what: str) -> str | None:
        if node is None:
            return None
        if isinstance(node, YamlScalar) and node.value is not None:
            return node.text
        self._add("TM1301", f"`{what}` is a text", node.span)
        return None

    def _with(self, node: YamlNode | None) -> None:
        values = self._map(node, "`with`")
        if values is None:
            self.spec.guessed = True
        for key, value in values.items if values else ():
            assert values is not None
            name = key.text
            if name not in self.spec.parameters:
                if not self.spec.complete:
                    continue
                near = [n for n in nearest(name, self.spec.parameters) if n not in values]
                known = listed(self.spec.parameters)
                self._add(
                    "TM1204",
                    f"the extended spec has no parameter `{name}`",
                    key.span,
                    help=f"did you mean `{near[0]}`?" if near else f"parameters: {known}" if known else "",
                )
                if not near:
                    self.spec.guessed = True
                    continue
                name = near[0]
            self.spec.values[name] = (values, value)

    def _parameters(self, node: YamlNode | None) -> None:
        declared = self._map(node, "`parameters`")
        for key, value in declared.items if declared else ():
            if not is_name(key.text) and key.text != "C":
                self._add("TM1211", f"`{key.text}` cannot be the name of a parameter", key.span, help=_NAMES)
                continue
            if isinstance(value, YamlScalar) and value.value is None:
                self._add(
                    "TM1202", f"`{key.text}` has neither a type nor a value", key.span,
                    help=f"`{key.text}: 4`, or `{key.text}: {{type: int}}` for specs that extend this one to set",
                )  # fmt: skip
                self.spec.guessed = True
            self.spec.parameters[key.text] = self._parameter(key, value)
            self.spec.values.pop(key.text, None)

    def _parameter(self, key: YamlScalar, node: YamlNode) -> ParameterDecl:
        if not isinstance(node, YamlMap):
            return ParameterDecl(key.text, key.span, None, node)
        node = corrected(node, PARAMETER_KEYS, f"the declaration of `{key.text}`", self.findings)
        type_node = node.get("type")
        type_ = self._type(type_node) if type_node is not None else None
        if type_node is None and "default" not in node:
            self._add("TM1202", f"`{key.text}` needs a type or a default", key.span, help="`type: int`")
            self.spec.guessed = True
        bounds = [node.get(b) for b in ("min", "max")]
        for bound in bounds:
            if bound is not None and not _is_number(bound):
                self._add("TM1301", "a bound is a number", bound.span)
        low, high = (b if isinstance(b, YamlScalar) and _is_number(b) else None for b in bounds)
        choices = node.get("choices")
        words = (
            tuple(c.text for c in choices.items if isinstance(c, YamlScalar)) if isinstance(choices, YamlList) else ()
        )
        if choices is not None and not words:
            self._add("TM1301", "`choices` is a list of words", choices.span)
        if words and type_node is None:
            type_ = syntax.TypeRef(key.span, words if len(words) > 1 else (*words, ""))
        return ParameterDecl(
            key.text, key.span, type_, node.get("default"), low, high, node.get("length"), words,
            self._text(node.get("doc"), "doc") or "",
        )  # fmt: skip

    def _type(self, node: YamlNode) -> syntax.TypeRef | None:
        many = False
        if isinstance(node, YamlList) and len(node.items) == 1:
            node, many = node.items[0], True
        text = node.text.strip() if isinstance(node, YamlScalar) else ""
        if text.startswith("[") and text.endswith("]"):
            text, many = text[1:-1].strip(), True
        if text not in TYPES:
            near = nearest(text, TYPES)
            help = f"did you mean `{near[0]}`?" if near else f"types: {', '.join(TYPES)}, or a list of one: [int]"
            if "|" in text:
                help = "words to choose from are given as `choices: [a, b]`"
            self._add(
                "TM1206", f"no type is called `{text}`" if text else "a type is missing here", node.span, help=help
            )
            return None
        return syntax.TypeRef(node.span, (text,), many)

    def _stages(self, node: YamlNode | None) -> None:
        if isinstance(node, YamlList):
            self.spec.stages, self.spec.numbered = None, {}
            stages = [self._map(item, "a stage") for item in node.items]
            keys = [k for k in STAGE_KEYS if k != "for"]
            items = tuple(corrected(stage, keys, "a stage", self.findings) for stage in stages if stage is not None)
            self.spec.keys["stages"] = YamlList(node.span, items if items else node.items, node.flow)
            return
        comprehension = self._map(node, "`stages`")
        if comprehension is None:
            return
        numbered = {key.text: value for key, value in comprehension.items if key.text.isdecimal()}
        rest = tuple(item for item in comprehension.items if item[0].text not in numbered)
        comprehension = YamlMap(comprehension.span, rest, comprehension.flow)
        if rest or not isinstance(self.spec.keys.get("stages"), YamlList):
            comprehension = corrected(comprehension, STAGE_KEYS, "`stages`", self.findings)
            self.spec.keys["stages"] = comprehension
            self.spec.stages = stage_on_top(self.spec.stages or {}, comprehension)
        for number, node in numbered.items():
            stage = self._map(node, f"stage {number}")
            if stage is not None:
                stage = corrected(stage, [k for k in STAGE_KEYS if k != "for"], f"stage {number}", self.findings)
                self.spec.numbered[number] = stage_on_top(self.spec.numbered.get(number, {}), stage)

    def _paper(self, node: YamlNode | None) -> None:
        paper = self._map(node, "`source`")
        if paper is not None:
            paper = corrected(paper, SOURCE_KEYS, "`source`", self.findings)
            self.spec.paper |= {k.text: self._text(v, k.text) or "" for k, v in paper.items if k.text != "status"}
            if "status" in paper:
                self._status(paper.get("status"))

    def _status(self, node: YamlNode | None) -> None:
        if not isinstance(node, YamlMap):
            self.spec.status = Status(self._text(node, "status") or "")
            return
        parts = corrected(node, STATUS_KEYS, "`status`", self.findings)
        texts = {key.text: self._text(value, key.text) or "" for key, value in parts.items}
        self.spec.status = Status("", {**self.spec.status.parts, **texts})

    def _input(self, node: YamlNode | None) -> tuple[int, int, int] | None:
        if isinstance(node, YamlList) and len(node.items) == 3:
            sizes = [i.value if isinstance(i, YamlScalar) else None for i in node.items]
            if all(isinstance(s, int) and not isinstance(s, bool) for s in sizes):
                wrong = next((i for i, s in enumerate(sizes) if not 0 < s <= 100_000), None)  # type: ignore[operator]
                if wrong is None:
                    return (sizes[0], sizes[1], sizes[2])  # type: ignore[return-value]
                self._add(
                    "TM1302", f"a side of an input has 1 to 100,000 pixels, got {sizes[wrong]}", node.items[wrong].span
                )
                return None
        self._add(
            "TM1301", "an input is [channels, height, width], three whole numbers", node.span if node else None,
            help="such as [3, 224, 224]",
        )  # fmt: skip
        return None

    def _init(self, node: YamlNode | None) -> None:
        init = self._map(node, "`init`")
        if init is None:
            return
        init = corrected(init, INIT_KEYS, "`init`", self.findings)
        self._distributions([item for item in init.items if item[0].text != "labels"], self.spec.init)
        labels = self._map(init.get("labels"), "`labels`") if "labels" in init else None
        if labels is not None:
            for key, _ in labels.items:
                if not is_name(key.text):
                    self._add("TM1211", f"`{key.text}` cannot be the label of a layer", key.span, help=_NAMES)
            named = [item for item in labels.items if is_name(item[0].text)]
            self._distributions(named, self.spec.init_labels)

    def _distributions(self, items: Iterable[tuple[YamlScalar, YamlNode]], rules: dict[str, YamlScalar]) -> None:
        for key, value in items:
            try:
                _check_distribution(key.text, value)
            except Mistake as mistake:
                self.findings.append(mistake.finding)
            else:
                assert isinstance(value, YamlScalar)
                rules[key.text] = value

    def _conventions(self, node: YamlNode | None) -> None:
        conventions = self._map(node, "`conventions`")
        for key, value in conventions.items if conventions else ():
            if key.text in CONVENTIONS or key.text in TALLIES or key.text == "params":
                what = "a built-in convention" if key.text in CONVENTIONS else "a count of its own"
                self._add("TM1208", f"`{key.text}` is {what}", key.span, help="choose another name")
                continue
            if not is_name(key.text):
                self._add("TM1211", f"`{key.text}` cannot be the name of a convention", key.span, help=_NAMES)
                continue
            rule = self._map(value, f"the convention `{key.text}`")
            if rule is None:
                continue
            rule = corrected(rule, [*TALLIES, "doc", "without"], f"the convention `{key.text}`", self.findings)
            weights: dict[str, int] = {}
            without: tuple[str, ...] = ()
            for name, weight in rule.items:
                if name.text == "without":
                    if isinstance(weight, YamlList) and all(isinstance(i, YamlScalar) for i in weight.items):
                        without = tuple(i.text for i in weight.items if isinstance(i, YamlScalar))
                    else:
                        self._add("TM1301", "`without` is a list of labels", weight.span)
                elif name.text in TALLIES:
                    number = self._whole(weight, f"the weight of `{name.text}`")
                    if number is not None:
                        weights[name.text] = number
            doc = self._text(rule.get("doc"), "doc") or ""
            self.spec.conventions[key.text] = Convention(key.text, weights, doc, without)

    def _layouts(self, node: YamlNode | None) -> None:
        from tokenmix.compiler.layouts import find_layout, known_layouts, read_layout, shipped_layouts, unknown_layout

        found: dict[str, Path] = {}
        for item in node.items if isinstance(node, YamlList) else (node,):
            name = self._text(item, "an entry of `layouts`")
            path = find_layout(name, self.source.folder) if name is not None else None
            if path is not None and name is not None:
                found[name] = path
                if path not in shipped_layouts().values():  # these are known to be sound
                    read_layout(path, self.findings)
            elif name is not None and item is not None:
                self.findings.append(unknown_layout(name, known_layouts((), self.source.folder), item.span))
        self.spec.layouts = {**found, **self.spec.layouts}

    def _rule(self, node: YamlNode | None) -> str | None:
        name = self._text(node, "rule")
        if name is not None and name not in self.spec.conventions:
            near = nearest(name, self.spec.conventions)
            self._add(
                "TM1206",
                f"no convention is called `{name}`",
                node.span if node else None,
                help=f"did you mean `{near[0]}`?" if near else f"conventions: {', '.join(self.spec.conventions)}",
            )
            return None
        return name

    def _figures(self, root: YamlMap) -> None:
        for key in ("published", "exact"):
            rows = root.get(key)
            if rows is None:
                continue
            if not isinstance(rows, YamlList):
                self._add("TM1301", f"`{key}` is a list of rows", rows.span)
                continue
            if len(rows.items) > MAX_ROWS:
                self._add("TM1302", f"`{key}` has at most {MAX_ROWS} rows", rows.items[MAX_ROWS].span)
            for item in rows.items[:MAX_ROWS]:
                row = self._map(item, f"a row of `{key}`")
                if row is not None:
                    (self._published if key == "published" else self._exact)(row)

    def _published(self, row: YamlMap) -> None:
        shape = self._input(row.get("input")) if "input" in row else None
        rule = self._rule(row.get("rule")) or self.spec.flops_rule
        printed = {}
        for key, value in row.items:
            if key.text in ("paper", "table", "row", "input", "dense", "rule", "note"):
                continue
            if isinstance(value, YamlScalar) and value.value is None:
                continue  # the paper prints no such figure
            near = nearest(key.text, PUBLISHED_KEYS) if key.text not in PUBLISHED_KEYS else []
            if near:  # any other word is a metric of the paper's: mIoU, AP
                self._add(
                    "TM1201",
                    f"a row of `published` has no key `{key.text}`",
                    key.span,
                    help=f"did you mean `{near[0]}`?",
                )
                continue
            text = self._text(value, key.text)
            if text is None:
                continue
            if key.text in UNITS and printed_number(text, UNITS[key.text]) is None:
                self._add("TM1301", f"`{key.text}` is a figure as printed, such as 35M or 3.6G, got {text}", value.span)
                continue
            printed[key.text] = text
        paper, table, name, note = (self._text(row.get(k), k) or "" for k in ("paper", "table", "row", "note"))
        dense = self._flag(row.get("dense"))
        self.spec.published.append(Published(row.span, paper, table, name, shape, dense, printed, rule, note))

    def _exact(self, row: YamlMap) -> None:
        shape = self._input(row.get("input")) if "input" in row else None
        values, spans = {}, {}
        known = ["params", *self.spec.conventions, *TALLIES]
        for key, value in row.items:
            if key.text in ("input", "dense"):
                continue
            if key.text not in known:
                near = nearest(key.text, known)
                self._add(
                    "TM1201",
                    f"`{key.text}` is not counted: neither params, nor a convention, nor a tally",
                    key.span,
                    help=f"did you mean `{near[0]}`?" if near else "",
                )
            else:
                number = self._whole(value, f"`{key.text}`")
                if number is not None:
                    values[key.text], spans[key.text] = number, value.span
        self.spec.exact.append(Exact(row.span, shape, self._flag(row.get("dense")), values, spans))

    def _whole(self, node: YamlNode, what: str) -> int | None:
        if isinstance(node, YamlScalar) and isinstance(node.value, int) and not isinstance(node.value, bool):
            return node.value
        number = node.text.replace(",", "") if isinstance(node, YamlScalar) else ""
        help = f"write `{number}`" if number.isdecimal() and number.isascii() else ""
        self._add("TM1301", f"{what} must be a whole number", node.span, help=help)
        return None

    def _flag(self, node: YamlNode | None) -> bool:
        if node is not None and not (isinstance(node, YamlScalar) and isinstance(node.value, bool)):
            self._add("TM1301", "`dense` is true or false", node.span)
        return isinstance(node, YamlScalar) and node.value is True


_NAMES = "names are made of a-z, A-Z, 0-9 and `_`, begin with a letter, and are no words of the language or of Python"


def _is_number(node: YamlNode) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_INTEGER


def _check_distribution(layer: str, node: YamlNode) -> None:
    """Raise `Mistake` unless the node is a distribution, such as `normal(sqrt(2 / in_channels))`."""
    if not isinstance(node, YamlScalar) or not isinstance(node.value, str):
        raise Mistake("TM1301", f"`{layer}` is a distribution, such as trunc_normal(0.02)", node.span)
    expr = parse_scalar(node)
    if not isinstance(expr, syntax.Call):
        raise Mistake("TM1301", f"`{layer}` is a distribution, such as trunc_normal(0.02)", expr.span)
    if expr.callee not in DISTRIBUTIONS:
        near = nearest(expr.callee, DISTRIBUTIONS)
        raise Mistake(
            "TM1206", f"no distribution is called `{expr.callee}`", expr.callee_span,
            help=f"did you mean `{near[0]}`?" if near else f"distributions: {', '.join(DISTRIBUTIONS)}",
        )  # fmt: skip
    sizes = {"in_channels": 64, "out_channels": 64, "kernel": 3, "groups": 1} if layer != "position_table" else {}
    evaluator = Evaluator(sizes, f"the initialisation of `{layer}`")
    values = [evaluator.value(a.value) for a in expr.tensors + expr.arguments]
    if len(values) != DISTRIBUTIONS[expr.callee] or any(a.name for a in expr.arguments):
        wanted = "one number" if DISTRIBUTIONS[expr.callee] else "nothing"
        raise Mistake("TM1306", f"`{expr.callee}` takes {wanted}, got {len(values)}", expr.span)
    for value, argument in zip(values, expr.tensors, strict=True):
        if isinstance(value, bool | str | tuple):
            raise Mistake("TM1301", f"`{expr.callee}` takes a number", argument.span)
        if value < 0 and expr.callee != "constant":
            what = "bound" if expr.callee == "uniform" else "standard deviation"
            raise Mistake(
                "TM1302", f"the {what} of `{expr.callee}` is at least 0, got {describe(value)}", argument.span
            )
