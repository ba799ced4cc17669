"""Strict YAML with a place for every key and value.

Scalars follow the YAML 1.2 core schema (`1e-5` is a float; `no`, `1:30` are texts), duplicate keys are refused,
anchors are followed within limits, tags and several documents are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from tokenmix.dsl.diagnostics import Finding, Mistake, Note, nearest
from tokenmix.dsl.limits import MAX_ALIASES, MAX_NESTING, MAX_SPEC_VALUES
from tokenmix.dsl.source import EmbeddedSource, Source, Span

__all__ = ["YamlList", "YamlMap", "YamlNode", "YamlScalar", "corrected", "read_yaml"]

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")


@dataclass(frozen=True)
class YamlScalar:
    """A scalar: its text, its value in the core schema, its quotes (empty: plain; "(": where they had to be)."""

    span: Span
    text: str
    value: bool | int | float | str | None
    style: str = ""

    @property
    def source(self) -> Source:
        """The text as a source of its own whose spans point into the file."""
        outer = self.span.source
        if self.style in ("|", ">"):
            return EmbeddedSource(outer, self.text, self._literal_starts())
        quote = 1 if self.style in ("'", '"') else 0
        start, end = self.span.start + quote, self.span.end - quote
        raw = outer.text[start:end]
        if raw == self.text:
            return EmbeddedSource(outer, self.text, [start])
        offsets = [start + k for k in _aligned(raw, self.text, self.style)]
        return EmbeddedSource(outer, self.text, offsets, every_character=True)

    def _literal_starts(self) -> list[int]:
        outer = self.span.source.text
        position = outer.find("\n", self.span.start) + 1 or len(outer)
        lines = self.text.split("\n")
        first = next((line for line in lines if line.strip()), "")
        starts = []
        indent: int | None = None
        for _ in lines:
            end = outer.find("\n", position)
            end = len(outer) if end < 0 else end
            if indent is None and outer[position:end].strip():
                indent = (
                    len(outer[position:end]) - len(outer[position:end].lstrip()) - (len(first) - len(first.lstrip()))
                )
            starts.append(min(position + max(indent or 0, 0), end))
            position = min(end + 1, len(outer))
        return starts


_ESCAPE = re.compile(r"\\(?:x..|u.{4}|U.{8}|\n\s*|.)", re.S)
_BLANKS = re.compile(r"\s+")


def _aligned(raw: str, text: str, style: str) -> list[int]:
    """For every character of a scalar's value, and for its end, the offset in the scalar as written."""
    offsets: list[int] = []
    i = 0
    while len(offsets) < len(text):
        if style == '"' and raw.startswith("\\", i):
            escape = _ESCAPE.match(raw, i)
            if escape is None:
                break
            if escape.group()[1] != "\n":  # a line break behind a backslash stands for nothing
                offsets.append(i)
            i = escape.end()
        elif style == "'" and raw.startswith("''", i):
            offsets.append(i)
            i += 2
        elif blanks := _BLANKS.match(raw, i):
            breaks = blanks.group().count("\n")
            count = len(blanks.group()) if breaks == 0 else max(1, breaks - 1)
            offsets += [min(i + k, blanks.end() - 1) for k in range(count)]
            i = blanks.end()
        elif i < len(raw):
            offsets.append(i)
            i += 1
        else:
            break
    offsets = offsets[: len(text)]
    return offsets + [min(i, len(raw))] * (len(text) + 1 - len(offsets))


@dataclass(frozen=True)
class YamlList:
    span: Span
    items: tuple[YamlNode, ...]
    flow: bool = False


@dataclass(frozen=True)
class YamlMap:
    span: Span
    items: tuple[tuple[YamlScalar, YamlNode], ...] = field(default=())
    flow: bool = False

    def get(self, key: str) -> YamlNode | None:
        return next((value for name, value in self.items if name.text == key), None)

    def key(self, key: str) -> YamlScalar:
        return next(name for name, _ in self.items if name.text == key)

    def __contains__(self, key: str) -> bool:
        return any(name.text == key for name, _ in self.items)


YamlNode = YamlScalar | YamlList | YamlMap


def read_yaml(source: Source, findings: list[Finding]) -> YamlNode | None:
    """The one document of a source, or None with the reason added to `findings`."""
    try:
        return _Reader(source, findings).document()
    except Mistake as mistake:
        findings.append(mistake.finding)
    except yaml.YAMLError as error:
        findings.append(_yaml_error(source, error))
    return None


# What libyaml says, as a part of its words -> what it means, how to mend it, and whether the place where the thing
# began tells more than the place where reading stopped. Its Python twin says the same in other words.
_PROBLEMS: tuple[tuple[str, str, str, bool], ...] = (
    ("mapping values are not allowed", "a `:` cannot stand here",
     "a value that holds `: ` is written in quotes; a key stands on a line of its own", False),
    ("found unexpected end of stream", "the quote is not closed", "close it with the same sign", True),
    ("unexpected end of stream", "the quote is not closed", "close it with the same sign", True),
    ("did not find expected ',' or", "a `,` or the closing bracket is missing",
     "inside {...} and [...], an expression that holds a comma, `: ` or a bracket is written in quotes", False),
    ("expected ',' or", "a `,` or the closing bracket is missing",
     "inside {...} and [...], an expression that holds a comma, `: ` or a bracket is written in quotes", False),
    ("did not find expected key", "the line does not belong to what stands above it",
     "keys of one map begin in the same column", False),
    ("expected <block end>", "the line does not belong to what stands above it",
     "keys of one map begin in the same column", False),
    ("did not find expected '-'", "the line does not belong to the list above it",
     "entries of one list begin with `-` in the same column", False),
    ("could not find expected ':'", "a `:` is missing", "a key is followed by `: ` and its value", True),
    ("sequence entries are not allowed", "a list cannot begin here", "put each `- ` on a line of its own", False),
    ("expected alphabetic or numeric character", "a `*` or `&` is followed by the name of an anchor",
     "a text that begins with `*` or `&` is written in quotes", False),
    ("did not find expected node content", "a value is missing", "", False),
    ("found incompatible YAML document", "the file asks for another version of YAML", "leave the line out", False),
    ("unknown escape character", "no such escape after the backslash",
     "in double quotes a backslash is written twice; single quotes take it as it is", False),
    ("found undefined tag handle", "specs have no tags", "a text that begins with `!` is written in quotes", True),
)  # fmt: skip


def _yaml_error(source: Source, error: yaml.YAMLError) -> Finding:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    offset = min(mark.index, len(source.text)) if mark is not None else getattr(error, "position", 0)
    notes: tuple[Note, ...] = ()
    message, help = problem, ""
    character = source.text[offset : offset + 1]
    known = next((p for p in _PROBLEMS if p[0] in problem), None)
    if "tab character" in problem:
        message, help = "a tab cannot indent a line of YAML", "indent with blanks"
    elif "cannot start any token" in problem:
        if character == "\t":
            message, help = "a tab cannot indent a line of YAML", "indent with blanks"
        else:
            message, help = f"no value begins with `{character}`", "write the value in quotes"
    elif known is not None:
        _, message, help, at_start = known
        began = getattr(error, "context_mark", None)
        if at_start and began is not None:
            offset = began.index
        elif began is not None and source.text[began.index : began.index + 1] in ("[", "{"):
            notes = (Note("the bracket was opened", source.span(began.index, began.index + 1)),)
            if character in ("]", "}"):
                message, help = f"`{character}` does not close `{source.text[began.index]}`", ""
        elif began is not None and source.position(began.index)[0] < source.position(offset)[0]:
            notes = (Note("the map or list above began", source.span(began.index, began.index + 1)),)
        start = source.text.rfind("\n", 0, offset) + 1
        key = re.match(r"[ ]+[\w.-]+\Z", source.text[start:offset])
        if character == ":" and key and not source.text[:start].rstrip().endswith(":"):
            offset = start + len(key.group()) - len(key.group().lstrip())
            message = "the line is indented deeper than the one above, which has its value already"
            help = "keys of one map begin in the same column"
    if offset >= len(source.text.rstrip()):  # the end of the file says little: show the last line that has something
        offset = max(0, len(source.text.rstrip()) - 1)
    word = re.compile(r"[\w.-]+").match(source.text, offset)
    message = f"not well-formed YAML: {message}"
    return Finding("TM1101", message, source.span(offset, word.end() if word else offset + 1), notes=notes, help=help)


class _Reader:
    def __init__(self, source: Source, findings: list[Finding]):
        self._source = source
        self._findings = findings
        self._anchors: dict[str, tuple[YamlNode | None, int]] = {}
        self._aliases = 0
        self._events: Iterator[Any] = iter(())

    def document(self) -> YamlNode | None:
        loader = _Loader(self._source.text)
        try:
            self._events = iter(loader.get_event, None)
            root: YamlNode | None = None
            for event in self._events:
                if isinstance(event, yaml.DocumentStartEvent):
                    if root is not None:
                        raise Mistake("TM1105", "a spec is one YAML document", self._span(event))
                    root, _ = self._node(next(self._events), 0)
            return root
        finally:
            loader.dispose()

    def _span(self, event: Any) -> Span:
        return self._source.span(event.start_mark.index, event.end_mark.index)

    def _node(self, event: Any, depth: int) -> tuple[YamlNode, int]:
        """A node and the number of values in it, aliases expanded."""
        span = self._span(event)
        if depth > MAX_NESTING:
            raise Mistake("TM1104", f"lists and maps are nested more than {MAX_NESTING} deep", span)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, span)
        if event.tag is not None and not (isinstance(event, yaml.ScalarEvent) and event.tag == "!"):
            tag = re.compile(r"\S*").match(self._source.text, event.start_mark.index).group()  # type: ignore[union-attr]
            span = self._source.span(event.start_mark.index, event.start_mark.index + len(tag))
            raise Mistake("TM1105", f"specs have no tags such as `{tag}`", span, help="leave the tag out")
        anchor = event.anchor
        if anchor is not None:
            self._anchors[anchor] = (None, 0)  # open: an alias to it from inside would be a cycle
        if isinstance(event, yaml.ScalarEvent):
            node: YamlNode = self._scalar(event, span)
            count = 1
        elif isinstance(event, yaml.SequenceStartEvent):
            node, count = self._list(event, span, depth)
        else:
            node, count = self._map(event, span, depth)
        if anchor is not None:
            self._anchors[anchor] = (node, count)
        return node, count

    def _alias(self, event: Any, span: Span) -> tuple[YamlNode, int]:
        node, count = self._anchors.get(event.anchor, (None, -1))
        if node is None:
            why = "stands inside of its own anchor" if count == 0 else "has no anchor above it"
            near = nearest(event.anchor, [name for name, (known, _) in self._anchors.items() if known is not None])
            help = (
                f"did you mean `*{near[0]}`?"
                if near
                else "an anchor is written `&name`; a text that begins with `*`, in quotes"
            )
            raise Mistake("TM1105", f"the alias `*{event.anchor}` {why}", span, help="" if count == 0 else help)
        self._aliases += 1
        if self._aliases > MAX_ALIASES:
            raise Mistake("TM1103", f"the spec uses more than {MAX_ALIASES} aliases", span)
        return node, count

    def _uncut(self, node: YamlNode) -> tuple[YamlNode, int]:
        """In {...} and [...] a comma ends a value: an expression that holds one, put together again, with a finding."""
        if not isinstance(node, YamlScalar) or node.style or node.text.count("(") <= node.text.count(")"):
            return node, 0
        source, depth = node.span.source, 0
        text = source.text
        for end in range(node.span.start, text.find("\n", node.span.start) % (len(text) + 1)):
            depth += (text[end] == "(") - (text[end] == ")")
            if depth == 0 and text[end] == ")":
                whole = text[node.span.start : end + 1]
                span = source.span(node.span.start, end + 1)
                self._findings.append(
                    Finding(
                        "TM1101", "in {...} and [...] a comma ends the value, also inside round brackets", span,
                        help=f'write it in quotes: `"{whole}"`',
                    )
                )  # fmt: skip
                return YamlScalar(span, whole, whole, "("), end + 1
        return node, 0

    def _too_many(self, span: Span) -> Mistake:
        return Mistake(
            "TM1103", f"here the spec passes the limit of {MAX_SPEC_VALUES:,} values, aliases expanded", span
        )

    def _scalar(self, event: Any, span: Span) -> YamlScalar:
        style = event.style if event.style in ("'", '"', "|", ">") else ""
        return YamlScalar(span, event.value, event.value if style else _core(event.value), style)

    def _list(self, event: Any, span: Span, depth: int) -> tuple[YamlList, int]:
        items: list[YamlNode] = []
        count, cut = 1, 0
        for inner in self._events:
            if isinstance(inner, yaml.SequenceEndEvent):
                span = span.source.span(span.start, self._span(inner).end)
                break
            node, size = self._node(inner, depth + 1)
            if node.span.start < cut:
                continue
            if event.flow_style:
                node, cut = self._uncut(node)
            items.append(node)
            count += size
            if count > MAX_SPEC_VALUES:
                raise self._too_many(node.span)
        return YamlList(span, tuple(items), bool(event.flow_style)), count

    def _map(self, event: Any, span: Span, depth: int) -> tuple[YamlMap, int]:
        items: dict[str, tuple[YamlScalar, YamlNode]] = {}
        count, cut = 1, 0
        for inner in self._events:
            if isinstance(inner, yaml.MappingEndEvent):
                span = span.source.span(span.start, self._span(inner).end)
                break
            key, _ = self._node(inner, depth + 1)
            if not isinstance(key, YamlScalar):
                raise Mistake("TM1105", "a key is a plain word, not a list or map", key.span)
            if key.text == "<<" and not key.style:
                raise Mistake(
                    "TM1105", "specs have no merge key `<<`", key.span,
                    help="a spec takes over another one with `extends`; an alias can stand for one whole value",
                )  # fmt: skip
            if not key.text and not key.style:
                raise Mistake(
                    "TM1101", "a key is missing here", key.span.source.span(key.span.start, key.span.start + 1)
                )
            value, size = self._node(next(self._events), depth + 1)
            if key.span.start < cut:
                continue
            if event.flow_style:
                value, cut = self._uncut(value)
            count += size + 1
            if count > MAX_SPEC_VALUES:
                raise self._too_many(value.span)
            if key.text in items:
                self._findings.append(
                    Finding(
                        "TM1102", f"the key `{key.text}` stands here a second time", key.span,
                        notes=(Note("first", items[key.text][0].span),), help="keep one of the two",
                    )
                )  # fmt: skip
                continue
            items[key.text] = (key, value)
        return YamlMap(span, tuple(items.values()), bool(event.flow_style)), count


def _core(text: str) -> bool | int | float | str | None:
    """Value of a plain scalar under the YAML 1.2 core schema."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if len(text) <= 40:
        if _INT.match(text):
            return int(text)
        if _OCTAL.match(text) or _HEX.match(text):
            return int(text, 0)
        if _FLOAT.match(text):
            return float(text)
    return text


def corrected(node: YamlMap, known: Iterable[str], what: str, findings: list[Finding]) -> YamlMap:
    """A map without the keys it should not have, which are findings; a misspelt key counts as the one that is meant.

    Args:
        node: the map as written.
        known: the keys it may have.
        what: how messages call it.
        findings: takes the findings.
    """
    if all(key.text in known for key, _ in node.items):
        return node
    known = list(known)
    items: dict[str, tuple[YamlScalar, YamlNode]] = {}
    for key, value in node.items:
        name = key.text
        if name not in known:
            near = [k for k in nearest(name, known) if k not in node and k not in items]
            findings.append(
                Finding(
                    "TM1201",
                    f"{what} has no key `{name}`",
                    key.span,
                    help=f"did you mean `{near[0]}`?" if near else f"keys: {', '.join(known)}",
                )
            )
            if not near:
                continue
            name, key = near[0], YamlScalar(key.span, near[0], near[0], key.style)
        items[name] = (key, value)
    return YamlMap(node.span, tuple(items.values()), node.flow)
