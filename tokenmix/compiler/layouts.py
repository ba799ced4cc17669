"""Layouts: how checkpoints of others name and store the weights of a family. Data in YAML files, read here.

Nothing is loaded here and no torch is needed: a layout tells where an entry of a checkpoint goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from tokenmix.compiler.spec import shipped_specs
from tokenmix.dsl.diagnostics import Finding, Note, nearest
from tokenmix.dsl.files import read_text
from tokenmix.dsl.limits import MAX_PLACEHOLDERS
from tokenmix.dsl.source import Span
from tokenmix.dsl.yaml_reader import YamlList, YamlMap, YamlNode, YamlScalar, corrected, read_yaml

__all__ = ["CHECKS", "LAYOUT_KEYS", "RULE_KEYS", "Layout", "Rule", "find_layout", "read_layout"]

LAYOUT_KEYS = {
    "layout": "version of layout files, 1; required",
    "doc": "whose checkpoints these are",
    "state": "nested entries that may hold the weights, the preferred one first; without them, the top",
    "rename": "parts of keys matched by `*` that have another name in the module",
    "keys": "key in the checkpoint -> key in the module, or a map of the next table; required",
    "check": "entries that are compared with what they must be, then dropped",
    "ignore": "entries that are dropped",
    "fresh": "weights of the module that such checkpoints do not have",
}
RULE_KEYS = {
    "to": "key in the module, or a list of keys among which the entry is split",
    "transpose": "`true`: the axes are stored in reverse order, as in linear layers of [in, out]",
    "reshape": "shape in the module: numbers, 0 for the axis that stands there, -1 for all that is left",
    "part": "number of this entry, from 0, among several that are joined to one weight",
    "axis": "axis along which entries are split or joined; default 0",
}
# Entries that follow from the sizes of the model, by name: tables that a checkpoint repeats.
CHECKS = ("relative_position_index",)

_FOLDER = "layouts"
_PLACEHOLDER = re.compile(r"\{([a-z]\w{0,20})(?:([+-])([0-9]{1,4}))?\}")
# Both take all they can and give nothing back, so that matching takes one pass over a key. Nothing is lost: behind a
# number stands no digit (see `_Reader._pattern`), and parts end at dots.
_NUMBER = "(0|[1-9][0-9]{0,5}+)"
_PART = "([^.]++)"


@dataclass(frozen=True)
class Pattern:
    """A key with placeholders: `{i}` is a whole number, `*` any one part between dots.

    Attributes:
        text: as written.
        expression: the same as a regular expression, its literal pieces escaped.
        names: what the groups of the expression stand for; `*` for parts.
    """

    text: str
    expression: re.Pattern[str]
    names: tuple[str, ...]

    def match(self, key: str) -> tuple[dict[str, int], list[str]] | None:
        """Numbers by name and parts in order, or None."""
        found = self.expression.fullmatch(key)
        if found is None:
            return None
        pairs = list(zip(self.names, found.groups(), strict=True))
        numbers = {name: int(text) for name, text in pairs if name != "*"}
        if any(numbers[name] != int(text) for name, text in pairs if name != "*"):
            return None  # one number twice in a key, with two values
        return numbers, [text for name, text in pairs if name == "*"]


@dataclass(frozen=True)
class Rule:
    """Where the entries that match a pattern go, and what is done to them on the way."""

    pattern: Pattern
    targets: tuple[str, ...]
    transpose: bool = False
    reshape: tuple[int, ...] | None = None
    part: int | None = None
    axis: int = 0

    def resolve(self, key: str, rename: Mapping[str, str]) -> tuple[str, ...] | None:
        """Keys in the module for an entry, or None if it does not match."""
        found = self.pattern.match(key)
        if found is None:
            return None
        numbers, parts = found
        keys = []
        for target in self.targets:
            shifted = {m[0]: numbers[m[1]] + int(f"{m[2] or '+'}{m[3] or 0}") for m in _PLACEHOLDER.finditer(target)}
            if any(number < 0 for number in shifted.values()):
                return None
            filled = _PLACEHOLDER.sub(lambda m: str(shifted[m[0]]), target)  # noqa: B023
            words = iter(rename.get(part, part) for part in parts)
            keys.append(".".join(next(words) if piece == "*" else piece for piece in filled.split(".")))
        return tuple(keys)


@dataclass(frozen=True)
class Layout:
    """How a family's checkpoints of one origin are laid out. `tokenmix` is the layout that changes nothing."""

    name: str
    doc: str = ""
    state: tuple[str, ...] = ()
    rename: Mapping[str, str] | None = None
    rules: tuple[Rule, ...] | None = None
    checks: tuple[tuple[Pattern, str], ...] = ()
    ignore: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()

    def resolve(self, key: str) -> tuple[Rule | None, tuple[str, ...]]:
        """The rule for an entry and the keys it goes to; none if there is no place for it."""
        if self.rules is None:
            return None, (key,)
        for rule in self.rules:
            targets = rule.resolve(key, self.rename or {})
            if targets is not None:
                return rule, targets
        return None, ()

    def parts(self, rule: Rule) -> int:
        """How many entries are joined where this one goes."""
        return 1 if rule.part is None else sum(r.targets == rule.targets for r in self.rules or ())

    def check(self, key: str) -> str | None:
        """Name of the check for an entry."""
        return next((name for pattern, name in self.checks if pattern.match(key) is not None), None)

    def is_ignored(self, key: str) -> bool:
        return fits(key, self.ignore)

    def is_fresh(self, key: str) -> bool:
        return fits(key, self.fresh)


def fits(key: str, globs: Iterable[str]) -> bool:
    """Whether a key fits one of several patterns of the shell, as `head.*`."""
    return any(fnmatchcase(key, glob) for glob in globs)


def find_layout(name: str, folder: Path) -> Path | None:
    """The file of a layout: in `layouts/` beside the spec that names it, beside it, or shipped."""
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        return None
    shipped = shipped_layouts()
    beside = [folder / _FOLDER / f"{name}.yaml", folder / f"{name}.yaml"]
    return next((path for path in beside if path.is_file()), shipped.get(name))


def shipped_layouts() -> dict[str, Path]:
    """Name -> file of the layouts that come with tokenmix."""
    folder = next(iter(shipped_specs().values())).parent / _FOLDER
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_layout(path: Path, findings: list[Finding]) -> Layout | None:
    """The layout in a file, or None; mistakes go to `findings`."""
    source = read_text(path, findings)
    root = read_yaml(source, findings) if source is not None else None
    if source is None or root is None:
        return None
    before = len(findings)
    layout = _Reader(findings).layout(path.stem, root)
    return layout if len(findings) == before else None


class _Reader:
    def __init__(self, findings: list[Finding]):
        self.findings = findings

    def _add(self, id: str, message: str, span: Span | None, help: str = "", notes: tuple[Note, ...] = ()) -> None:
        self.findings.append(Finding(id, message, span, help=help, notes=notes))

    def layout(self, name: str, root: YamlNode) -> Layout | None:
        start = root.span.source.span(root.span.start, root.span.start + 1)
        if not isinstance(root, YamlMap):
            self._add("TM1101", "a layout is a map of keys and values", start, "it begins with `layout: 1`")
            return None
        root = corrected(root, LAYOUT_KEYS, "a layout", self.findings)
        version = root.get("layout")
        if version is None:
            self._add("TM1202", "the layout does not say that it is one", start, "begin with `layout: 1`")
        elif not isinstance(version, YamlScalar) or version.value != 1 or isinstance(version.value, bool):
            self._add("TM1302", "this version of tokenmix reads layouts of version 1", version.span, "`layout: 1`")
        keys = root.get("keys")
        if keys is None:
            self._add("TM1202", "the layout has no `keys`", start, "`keys:`, and below it `their.key: our.key`")
        doc = root.get("doc")
        checks = []
        for key, value in self._pairs(root.get("check"), "check"):
            pattern = self._pattern(key)
            word = self._text(value, "a check")
            if word is not None and word not in CHECKS:
                self._add("TM1206", f"no check is called `{word}`", value.span, f"checks: {', '.join(CHECKS)}")
            elif pattern is not None and word is not None:
                checks.append((pattern, word))
        rename = {k.text: self._text(v, "a part") or "" for k, v in self._pairs(root.get("rename"), "rename")}
        rules = [self._rule(key, value) for key, value in self._pairs(keys, "keys")]
        self._joined([(rule, key) for rule, (key, _) in zip(rules, self._pairs(keys, "keys"), strict=True) if rule])
        return Layout(
            name, (self._text(doc, "doc") or "") if doc else "", self._texts(root.get("state"), "state"), rename,
            tuple(rule for rule in rules if rule), tuple(checks),
            self._texts(root.get("ignore"), "ignore"), self._texts(root.get("fresh"), "fresh"),
        )  # fmt: skip

    def _pairs(self, node: YamlNode | None, what: str) -> tuple[tuple[YamlScalar, YamlNode], ...]:
        if node is not None and not isinstance(node, YamlMap):
            self._add("TM1301", f"`{what}` is a map", node.span)
        return node.items if isinstance(node, YamlMap) else ()

    def _text(self, node: YamlNode, what: str) -> str | None:
        if isinstance(node, YamlScalar) and node.text:
            return node.text
        self._add("TM1301", f"{what} is a text", node.span)
        return None

    def _texts(self, node: YamlNode | None, what: str) -> tuple[str, ...]:
        if node is None:
            return ()
        nodes = node.items if isinstance(node, YamlList) else (node,)
        return tuple(text for item in nodes if (text := self._text(item, f"an entry of `{what}`")) is not None)

    def _pattern(self, key: YamlScalar) -> Pattern | None:
        pieces, names, end = [], [], 0
        text = key.text
        if any("*" in piece and piece != "*" for piece in text.split(".")):
            self._add("TM1801", "`*` stands for a whole part of a key, between dots", key.span)
            return None
        marks = list(re.finditer(r"\{[^{}]*\}|[{}]|\*", text))
        if len(marks) > MAX_PLACEHOLDERS:
            mark = key.source.span(*marks[MAX_PLACEHOLDERS].span())
            self._add("TM1801", f"a key has at most {MAX_PLACEHOLDERS} placeholders; this has {len(marks)}", mark)
            return None
        for found in marks:
            pieces.append(re.escape(text[end : found.start()]))
            end = found.end()
            placeholder = _PLACEHOLDER.fullmatch(found[0])
            if found[0] == "*":
                pieces.append(_PART)
                names.append("*")
            elif placeholder is not None and placeholder[2] is None:
                if text[end : end + 1] in {"{", *"0123456789"}:
                    self._add(
                        "TM1801", f"it is not told where the number `{found[0]}` ends",
                        key.source.span(found.start(), end + 1), "write something other than a digit behind it",
                    )  # fmt: skip
                    return None
                pieces.append(_NUMBER)
                names.append(placeholder[1])
            else:
                help = "a number is `{i}`; sums such as `{i+1}` stand on the right" if placeholder else "write `{i}`"
                self._add("TM1801", f"`{found[0]}` is no placeholder of a key in the checkpoint", key.span, help)
                return None
        pieces.append(re.escape(text[end:]))
        return Pattern(text, re.compile("".join(pieces)), tuple(names))

    def _rule(self, key: YamlScalar, node: YamlNode) -> Rule | None:
        pattern = self._pattern(key)
        transpose, part, axis, reshape = False, None, 0, None
        to: YamlNode | None = node
        if isinstance(node, YamlMap):
            node = corrected(node, RULE_KEYS, f"the rule for `{key.text}`", self.findings)
            to = node.get("to")
            if to is None:
                self._add("TM1202", f"the rule for `{key.text}` does not say where it goes", key.span, "`to: our.key`")
                return None
            flag = node.get("transpose")
            if flag is not None and not (isinstance(flag, YamlScalar) and isinstance(flag.value, bool)):
                self._add("TM1301", "`transpose` is true or false", flag.span)
            transpose = isinstance(flag, YamlScalar) and flag.value is True
            part = self._number(node.get("part"), "part")
            axis = self._number(node.get("axis"), "axis") or 0
            reshape = self._shape(node.get("reshape"))
        targets = self._texts(to, "to")
        sound = [self._target(text, pattern, to.span) for text in targets] if pattern is not None and to else []
        if pattern is None or not targets or not all(sound):
            return None
        if part is not None and len(targets) > 1:
            self._add("TM1803", "an entry is either split or joined, not both", key.span)
            return None
        return Rule(pattern, targets, transpose, reshape, part, axis)

    def _target(self, text: str, pattern: Pattern, span: Span) -> bool:
        """Whether the placeholders on the right are those of the left."""
        bare = _PLACEHOLDER.sub("", text)
        unknown = [m[1] for m in _PLACEHOLDER.finditer(text) if m[1] not in pattern.names]
        if "{" in bare or "}" in bare:
            help = "numbers are `{i}`, `{i+1}` or `{i-1}`"
            self._add("TM1801", f"`{text}` holds a brace that belongs to no placeholder", span, help)
        elif unknown:
            known = ", ".join(f"`{{{name}}}`" for name in dict.fromkeys(pattern.names) if name != "*")
            self._add(
                "TM1801", f"`{{{unknown[0]}}}` on the right stands for nothing on the left", span,
                f"the key has {known}" if known else "the key has no numbers",
            )  # fmt: skip
        elif any("*" in piece and piece != "*" for piece in text.split(".")):
            self._add("TM1801", "`*` stands for a whole part of a key, between dots", span)
        elif text.split(".").count("*") != pattern.names.count("*"):
            self._add(
                "TM1801", f"`{pattern.text}` and `{text}` do not have `*` equally often", span,
                "what a `*` on the left matches stands at the `*` on the right, in order",
            )  # fmt: skip
        else:
            return True
        return False

    def _number(self, node: YamlNode | None, what: str) -> int | None:
        if node is None:
            return None
        value = node.value if isinstance(node, YamlScalar) else None
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 100:
            return value
        self._add("TM1301", f"`{what}` is a whole number from 0", node.span)
        return None

    def _shape(self, node: YamlNode | None) -> tuple[int, ...] | None:
        if node is None:
            return None
        values = [getattr(item, "value", None) for item in node.items] if isinstance(node, YamlList) else []
        sizes = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= -1]
        if not sizes or len(sizes) != len(values) or sizes.count(-1) > 1:
            self._add("TM1301", "`reshape` is a list of whole numbers with -1 at most once", node.span, "`[0, -1]`")
            return None
        return tuple(sizes)

    def _joined(self, rules: list[tuple[Rule, YamlScalar]]) -> None:
        """Entries that are joined are numbered 0, 1, 2, ..., and no two others go to one place."""
        places: dict[tuple[str, ...], list[tuple[Rule, YamlScalar]]] = {}
        for rule, key in rules:
            places.setdefault(rule.targets, []).append((rule, key))
        for (target, *_), found in places.items():
            numbers = [rule.part for rule, _ in found]
            joined = [number for number in numbers if number is not None]
            if joined and (len(joined) < len(numbers) or sorted(joined) != list(range(len(joined)))):
                key = found[-1][1]
                self._add(
                    "TM1803", f"the parts of `{target}` are {', '.join(map(str, numbers)).replace('None', 'none')}",
                    key.span, "parts are numbered 0, 1, 2, ..., each once",
                    tuple(Note("another part", k.span) for _, k in found[:-1]),
                )  # fmt: skip


def known_layouts(names: Iterable[str], folder: Path) -> list[str]:
    """Names near which a misspelt one may lie."""
    beside = [p.stem for p in (folder / _FOLDER).glob("*.yaml")] if folder.is_dir() else []
    return list(dict.fromkeys([*names, *beside, *shipped_layouts()]))


def unknown_layout(name: str, known: Iterable[str], span: Span | None) -> Finding:
    known = list(known)
    near = nearest(name, known)
    help = f"did you mean `{near[0]}`?" if near else f"layouts: {', '.join(known)}" if known else ""
    return Finding("TM1802", f"no layout is called `{name}`", span, help=help)
