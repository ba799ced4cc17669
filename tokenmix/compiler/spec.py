"""Specs as written: YAML checked against the keys a spec has, with its `extends` bases folded in.

Nothing is evaluated here; `plan` puts numbers in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenmix.blocks.cost import CONVENTIONS, TALLIES, Convention
from tokenmix.compiler.library import Library
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding, Mistake, nearest
from tokenmix.dsl.expressions import TYPES
from tokenmix.dsl.files import read_text
from tokenmix.dsl.parser import RESERVED, parse_expression
from tokenmix.dsl.source import Source, Span
from tokenmix.dsl.yaml_reader import YamlList, YamlMap, YamlNode, YamlScalar, read_yaml

__all__ = ["SPEC_KEYS", "Exact", "ParameterDecl", "Published", "Spec", "find_spec", "printed_number", "read_spec", "shipped_specs"]

# Every key of a spec, in the order in which `tokenmix fmt` prints them.
SPEC_KEYS: dict[str, str] = {
    "tokenmix": "version of the language, 1",
    "name": "name of the model; the emitted class is called after it",
    "extends": "name of a spec to start from, beside this one or shipped",
    "with": "values for parameters of the extended spec",
    "doc": "what a reader should know",
    "source": "the paper: title, venue, arxiv, code, status",
    "parameters": "hyperparameters of the model: defaults, or type, default, min, max, length, choices and doc",
    "input": "shape of an image, [channels, height, width]",
    "stem": "block that turns the image into the first map",
    "stages": "the stages, one by one or as a comprehension with `for`",
    "features": "block put on each stage's map when the model is used as a dense backbone",
    "head": "block that turns the last map into the result",
    "init": "initialisation by kind of layer",
    "definitions": "block definitions of this spec, in the block language",
    "conventions": "counting rules of the paper: weights of tallies",
    "flops_rule": "the convention under which printed FLOPs are compared",
    "published": "figures printed in the paper, row by row",
    "exact": "integers the model must have; `tokenmix flops` fails if one is missed",
}
STAGE_KEYS = {
    "for": "the loop variable and its range, `i in 0..4`",
    "down": "block in front of the stage's blocks: a call, or {when: condition, block: call}",
    "blocks": "a block, or a list of blocks that take turns",
    "repeat": "how many blocks the stage has (default 1)",
    "body": "one block that is the whole stage, instead of `blocks`",
}
PARAMETER_KEYS = ("type", "default", "min", "max", "length", "choices", "doc")
SOURCE_KEYS = ("title", "venue", "arxiv", "code", "status", "authors", "year")
PUBLISHED_KEYS = ("table", "input", "dense", "params", "flops", "rule", "note")
INIT_KEYS = ("linear", "pointwise", "conv", "position_table")

_SPECS = (Path(__file__).parent.parent / "specs", Path(__file__).parent.parent.parent / "specs")


@dataclass(frozen=True)
class ParameterDecl:
    """A declared hyperparameter of a model."""

    name: str
    span: Span
    type: syntax.TypeRef | None
    default: YamlNode | None
    low: YamlScalar | None = None
    high: YamlScalar | None = None
    length: YamlNode | None = None
    choices: tuple[str, ...] = ()
    doc: str = ""


@dataclass(frozen=True)
class Published:
    """A row of printed figures. `printed` maps a quantity (params, flops, top1, ...) to the string as printed."""

    span: Span
    table: str
    input: tuple[int, int, int] | None
    dense: bool
    printed: Mapping[str, str]
    rule: str
    note: str = ""


@dataclass(frozen=True)
class Exact:
    """Integers the model must have at one input shape: `params`, or a convention or tally by name."""

    span: Span
    input: tuple[int, int, int] | None
    dense: bool
    values: Mapping[str, int]
    spans: Mapping[str, Span]


@dataclass
class Spec:
    """A spec with its bases folded in: nearest text first where both say something."""

    name: str
    source: Source
    root: YamlMap
    values: dict[str, tuple[YamlMap, YamlNode]] = field(default_factory=dict)  # `with`, nearest wins
    parameters: dict[str, ParameterDecl] = field(default_factory=dict)
    keys: dict[str, YamlNode] = field(default_factory=dict)
    stages: dict[str, YamlNode] | None = None  # a comprehension, merged key by key
    paper: dict[str, str] = field(default_factory=dict)
    doc: str = ""
    input: tuple[int, int, int] | None = None
    init: dict[str, YamlScalar] = field(default_factory=dict)
    conventions: dict[str, Convention] = field(default_factory=lambda: dict(CONVENTIONS))
    flops_rule: str = "mac"
    published: list[Published] = field(default_factory=list)
    exact: list[Exact] = field(default_factory=list)
    definitions: list[Source] = field(default_factory=list)
    bases: list[Source] = field(default_factory=list)
    folder: Path | None = None

    @property
    def is_family(self) -> bool:
        """Whether parameters without a value remain: a base to extend, not a model."""
        return any(p.default is None and name not in self.values for name, p in self.parameters.items())

    def library(self) -> Library:
        return Library(self.definitions, self.folder) if self.definitions or self.folder else _shipped_library()


@cache
def _shipped_library() -> Library:
    return Library()


@cache
def shipped_specs() -> dict[str, Path]:
    """Name -> file of the specs that come with tokenmix."""
    folder = next((f for f in _SPECS if f.is_dir()), None)
    return {p.stem: p for p in sorted(folder.rglob("*.yaml"))} if folder else {}


def find_spec(name: str, findings: list[Finding]) -> Path | None:
    """The file of a spec given by path or by the name of a shipped one."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    if name in shipped_specs():
        return shipped_specs()[name]
    near = nearest(name, shipped_specs())
    findings.append(
        Finding(
            "TM1005",
            f"no spec is called `{name}`",
            help=f"did you mean `{near[0]}`?" if near else "`tokenmix list specs` shows all; a file is given as a path, ending in .yaml",
        )
    )
    return None


def read_spec(path: Path, findings: list[Finding]) -> Spec | None:
    """The spec in a file with everything it extends, or None; mistakes go to `findings`."""
    chain = _chain(path, findings)
    if chain is None:
        return None
    source, root = chain[0]
    spec = Spec(source.folder.joinpath(source.name).stem, source, root)
    if any(s.folder.resolve() not in {f.resolve() for f in _SPECS} | {p.parent.resolve() for p in shipped_specs().values()} for s, _ in chain):
        spec.folder = source.folder
    for text, base in reversed(chain):
        _Reader(spec, text, findings).fold(base, own=base is root)
    spec.bases = [s for s, _ in chain[1:]]
    return spec


def _chain(path: Path, findings: list[Finding]) -> list[tuple[Source, YamlMap]] | None:
    """The spec and its bases, nearest first."""
    chain: list[tuple[Source, YamlMap]] = []
    seen: dict[Path, Span | None] = {}
    link: Span | None = None
    while True:
        if path.resolve() in seen:
            circle = " -> ".join([*(Path(s.name).stem for s, _ in chain), path.stem])
            findings.append(Finding("TM1209", f"specs extend each other in a circle: {circle}", link))
            return None
        seen[path.resolve()] = link
        read = _document(path, findings)
        if read is None:
            return None
        source, root = read
        if not isinstance(root, YamlMap):
            findings.append(
                Finding("TM1101", "a spec is a map of keys and values", root.span, help="it begins with `tokenmix: 1`")
            )
            return None
        chain.append((source, root))
        base = root.get("extends")
        if base is None:
            return chain
        if not isinstance(base, YamlScalar) or not isinstance(base.value, str):
            findings.append(Finding("TM1301", "`extends` is the name of a spec", base.span))
            return None
        found = _find_base(base, source, findings)
        if found is None:
            return None
        path, link = found, base.span


# Documents without findings, by path, time and size: many variants extend one family.
_DOCUMENTS: dict[tuple[Path, int, int], tuple[Source, YamlNode]] = {}


def _document(path: Path, findings: list[Finding]) -> tuple[Source, YamlNode] | None:
    try:
        status = path.stat()
        key = (path, status.st_mtime_ns, status.st_size)
    except OSError:
        key = (path, 0, 0)
    if key not in _DOCUMENTS:
        before = len(findings)
        source = read_text(path, findings)
        root = read_yaml(source, findings) if source else None
        if source is None or root is None:
            return None
        if len(findings) > before:
            return source, root
        _DOCUMENTS[key] = (source, root)
    return _DOCUMENTS[key]


def _find_base(name: YamlScalar, source: Source, findings: list[Finding]) -> Path | None:
    text = name.text.removesuffix(".yaml")
    if Path(text).is_absolute() or ".." in Path(text).parts:
        findings.append(Finding("TM1001", f"`extends` names a spec beside this one or a shipped one, not `{name.text}`", name.span))
        return None
    beside = source.folder / f"{text}.yaml"
    if beside.is_file():
        return beside
    if text in shipped_specs():
        return shipped_specs()[text]
    known = [p.stem for p in source.folder.glob("*.yaml")] + list(shipped_specs())
    near = nearest(text, known)
    findings.append(
        Finding(
            "TM1005",
            f"no spec `{text}` lies beside this one and none is shipped under that name",
            name.span,
            help=f"did you mean `{near[0]}`?" if near else "",
        )
    )
    return None


class _Reader:
    """Folds one YAML document into a spec that already holds its bases."""

    def __init__(self, spec: Spec, source: Source, findings: list[Finding]):
        self.spec = spec
        self.source = source
        self.findings = findings

    def _add(self, id: str, message: str, span: Span | None, **details: Any) -> None:
        self.findings.append(Finding(id, message, span, **details))

    def fold(self, root: YamlMap, *, own: bool) -> None:
        self._keys(root, SPEC_KEYS, "a spec")
        self._version(root)
        spec = self.spec
        for key in ("stem", "head", "features"):
            if key in root:
                node = root.get(key)
                assert node is not None
                spec.keys[key] = node
        name = self._text(root.get("name"), "name")
        if own and name is not None:
            node = root.get("name")
            if not name.isidentifier() or name in RESERVED:
                self._add(
                    "TM1211",
                    f"`{name}` cannot be the name of a model",
                    node.span if node else None,
                    help="letters, digits and underscores, beginning with a letter",
                )
            spec.name = name
        elif own and "name" not in root:
            self._add("TM1202", "the spec has no `name`", root.span.source.span(0, 1), help="`name: my_model`")
        if "with" in root:
            self._with(root.get("with"))
        if "parameters" in root:
            self._parameters(root.get("parameters"))
        if "stages" in root:
            self._stages(root.get("stages"))
        if "source" in root:
            self._paper(root.get("source"))
        spec.doc = self._text(root.get("doc"), "doc") or spec.doc
        if "input" in root:
            spec.input = self._input(root.get("input"))
        if "init" in root:
            self._init(root.get("init"))
        if "definitions" in root:
            node = root.get("definitions")
            if isinstance(node, YamlScalar) and isinstance(node.value, str):
                spec.definitions.insert(0, node.source)
            else:
                self._add("TM1301", "`definitions` is a text in the block language", node.span if node else None)
        if "conventions" in root:
            self._conventions(root.get("conventions"))
        if "flops_rule" in root:
            spec.flops_rule = self._rule(root.get("flops_rule")) or spec.flops_rule
        if own:
            self._figures(root)

    def _keys(self, node: YamlMap, known: Any, what: str) -> None:
        for key, _ in node.items:
            if key.text not in known:
                near = nearest(key.text, known)
                self._add(
                    "TM1201",
                    f"{what} has no key `{key.text}`",
                    key.span,
                    help=f"did you mean `{near[0]}`?" if near else f"keys: {', '.join(known)}",
                )

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
        for key, value in values.items if values else ():
            if key.text not in self.spec.parameters:
                near = nearest(key.text, self.spec.parameters)
                self._add(
                    "TM1204",
                    f"the extended spec has no parameter `{key.text}`",
                    key.span,
                    help=f"did you mean `{near[0]}`?" if near else f"parameters: {', '.join(self.spec.parameters)}",
                )
                continue
            assert values is not None
            self.spec.values[key.text] = (values, value)

    def _parameters(self, node: YamlNode | None) -> None:
        declared = self._map(node, "`parameters`")
        for key, value in declared.items if declared else ():
            if not key.text.isidentifier() or key.text in RESERVED - {"C"}:
                self._add("TM1211", f"`{key.text}` cannot be the name of a parameter", key.span)
                continue
            self.spec.parameters[key.text] = self._parameter(key, value)
            self.spec.values.pop(key.text, None)

    def _parameter(self, key: YamlScalar, node: YamlNode) -> ParameterDecl:
        if not isinstance(node, YamlMap):
            return ParameterDecl(key.text, key.span, None, node)
        self._keys(node, PARAMETER_KEYS, f"the declaration of `{key.text}`")
        type_node = node.get("type")
        type_ = self._type(type_node) if type_node is not None else None
        if type_node is None and "default" not in node:
            self._add("TM1202", f"`{key.text}` needs a type or a default", key.span, help="`type: int`")
        bounds = [node.get(b) for b in ("min", "max")]
        for bound in bounds:
            if bound is not None and (not isinstance(bound, YamlScalar) or not isinstance(bound.value, int | float)):
                self._add("TM1301", "a bound is a number", bound.span)
        low, high = (
            b if isinstance(b, YamlScalar) and isinstance(b.value, int | float) else None for b in bounds
        )
        choices = node.get("choices")
        words = tuple(c.text for c in choices.items if isinstance(c, YamlScalar)) if isinstance(choices, YamlList) else ()
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
            self._add(
                "TM1206",
                f"no type is called `{text}`",
                node.span,
                help=f"did you mean `{near[0]}`?" if near else f"types: {', '.join(TYPES)}, or a list of one: [int]",
            )
            return None
        return syntax.TypeRef(node.span, (text,), many)

    def _stages(self, node: YamlNode | None) -> None:
        if isinstance(node, YamlList):
            self.spec.stages = None
            self.spec.keys["stages"] = node
            for item in node.items:
                stage = self._map(item, "a stage")
                if stage is not None:
                    self._keys(stage, [k for k in STAGE_KEYS if k != "for"], "a stage")
            return
        comprehension = self._map(node, "`stages`")
        if comprehension is None:
            return
        self._keys(comprehension, STAGE_KEYS, "`stages`")
        merged = dict(self.spec.stages or {})
        self.spec.keys["stages"] = comprehension
        new = {key.text: value for key, value in comprehension.items}
        for one, other in (("body", "blocks"), ("blocks", "body")):
            if one in new and other not in new:
                merged.pop(other, None)  # a base's blocks give way to this spec's body, and the reverse
        self.spec.stages = {**merged, **new}

    def _paper(self, node: YamlNode | None) -> None:
        paper = self._map(node, "`source`")
        if paper is not None:
            self._keys(paper, SOURCE_KEYS, "`source`")
            self.spec.paper |= {k.text: self._text(v, k.text) or "" for k, v in paper.items}

    def _input(self, node: YamlNode | None) -> tuple[int, int, int] | None:
        if isinstance(node, YamlList) and len(node.items) == 3:
            sizes = [i.value if isinstance(i, YamlScalar) else None for i in node.items]
            if all(isinstance(s, int) and not isinstance(s, bool) and 0 < s <= 100_000 for s in sizes):
                return (sizes[0], sizes[1], sizes[2])  # type: ignore[return-value]
        self._add("TM1301", "an input is [channels, height, width], such as [3, 224, 224]", node.span if node else None)
        return None

    def _init(self, node: YamlNode | None) -> None:
        init = self._map(node, "`init`")
        if init is None:
            return
        self._keys(init, INIT_KEYS, "`init`")
        for key, value in init.items:
            if isinstance(value, YamlScalar) and isinstance(value.value, str):
                self.spec.init[key.text] = value
            else:
                self._add("TM1301", f"`{key.text}` is a distribution, such as trunc_normal(0.02)", value.span)

    def _conventions(self, node: YamlNode | None) -> None:
        conventions = self._map(node, "`conventions`")
        for key, value in conventions.items if conventions else ():
            if key.text in CONVENTIONS:
                self._add("TM1208", f"`{key.text}` is a built-in convention", key.span)
                continue
            rule = self._map(value, f"the convention `{key.text}`")
            if rule is None:
                continue
            self._keys(rule, [*TALLIES, "doc", "without"], f"the convention `{key.text}`")
            weights, without = {}, ()
            for name, weight in rule.items:
                if name.text == "without" and isinstance(weight, YamlList):
                    without = tuple(i.text for i in weight.items if isinstance(i, YamlScalar))
                elif name.text in TALLIES:
                    if isinstance(weight, YamlScalar) and isinstance(weight.value, int):
                        weights[name.text] = weight.value
                    else:
                        self._add("TM1301", f"the weight of `{name.text}` is a whole number", weight.span)
            doc = self._text(rule.get("doc"), "doc") or ""
            self.spec.conventions[key.text] = Convention(key.text, weights, doc, without)

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
            for item in rows.items:
                row = self._map(item, f"a row of `{key}`")
                if row is not None:
                    (self._published if key == "published" else self._exact)(row)

    def _published(self, row: YamlMap) -> None:
        shape = self._input(row.get("input")) if "input" in row else None
        rule = self._rule(row.get("rule")) or self.spec.flops_rule
        printed = {}
        for key, value in row.items:
            if key.text in ("table", "input", "dense", "rule", "note"):
                continue
            text = self._text(value, key.text)
            if text is None:
                continue
            if key.text in ("params", "flops") and printed_number(text) is None:
                self._add("TM1301", f"`{key.text}` is a figure as printed, such as 35M or 3.6G, got {text}", value.span)
                continue
            printed[key.text] = text
        table = self._text(row.get("table"), "table") or ""
        note = self._text(row.get("note"), "note") or ""
        self.spec.published.append(Published(row.span, table, shape, _flag(row.get("dense")), printed, rule, note))

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
            elif not isinstance(value, YamlScalar) or not isinstance(value.value, int):
                self._add("TM1301", f"`{key.text}` is a whole number", value.span)
            else:
                values[key.text], spans[key.text] = value.value, value.span
        self.spec.exact.append(Exact(row.span, shape, _flag(row.get("dense")), values, spans))


def _flag(node: YamlNode | None) -> bool:
    return isinstance(node, YamlScalar) and node.value is True


def printed_number(text: str) -> tuple[str, int] | None:
    """Digits and power of ten of a printed figure: `3.6G` is ("3.6", 9)."""
    powers = {"K": 3, "M": 6, "G": 9, "T": 12}
    digits, unit = (text[:-1], text[-1]) if text and text[-1] in powers else (text, "")
    parts = digits.split(".")
    if len(parts) > 2 or not all(p.isdigit() and p for p in parts):
        return None
    return digits, powers.get(unit, 0)


def parse_scalar(node: YamlScalar) -> syntax.Expr:
    """A scalar of a spec as an expression; the same scalar is parsed once. Raises `Mistake`."""
    if node.value is None:
        raise Mistake("TM1202", "a value is missing here", node.span)
    if id(node) not in _EXPRESSIONS:
        _EXPRESSIONS[id(node)] = (node, parse_expression(node.source))
    return _EXPRESSIONS[id(node)][1]


_EXPRESSIONS: dict[int, tuple[YamlScalar, syntax.Expr]] = {}
