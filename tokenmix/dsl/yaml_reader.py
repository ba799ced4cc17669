"""Strict YAML with a place for every key and value.

Scalars follow the YAML 1.2 core schema (`1e-5` is a float; `no`, `1:30` are texts), duplicate keys are refused,
anchors are followed within limits, tags and several documents are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from tokenmix.dsl.diagnostics import Finding, Mistake
from tokenmix.dsl.limits import MAX_ALIASES, MAX_NESTING, MAX_SPEC_VALUES
from tokenmix.dsl.source import EmbeddedSource, Source, Span

__all__ = ["YamlList", "YamlMap", "YamlScalar", "YamlNode", "read_yaml"]

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")


@dataclass(frozen=True)
class YamlScalar:
    """A scalar: its text, the value of the core schema, and how it was quoted (empty for plain)."""

    span: Span
    text: str
    value: None | bool | int | float | str
    style: str = ""

    @property
    def source(self) -> Source:
        """The text as a source of its own whose spans point into the file."""
        outer = self.span.source
        if self.style in ("|", ">"):
            return EmbeddedSource(outer, self.text, self._literal_starts())
        return EmbeddedSource(outer, self.text, [self.span.start + (1 if self.style else 0)])

    def _literal_starts(self) -> list[int]:
        outer = self.span.source.text
        position = outer.index("\n", self.span.start) + 1
        lines = self.text.split("\n")
        first = next((line for line in lines if line.strip()), "")
        starts = []
        indent: int | None = None
        for _ in lines:
            end = outer.find("\n", position)
            end = len(outer) if end < 0 else end
            if indent is None and outer[position:end].strip():
                indent = len(outer[position:end]) - len(outer[position:end].lstrip()) - (len(first) - len(first.lstrip()))
            starts.append(min(position + (indent or 0), len(outer)))
            position = end + 1
        return starts


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


def _yaml_error(source: Source, error: yaml.YAMLError) -> Finding:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    offset = min(mark.index, len(source.text)) if mark is not None else 0
    help = ""
    if "found character '\\t'" in problem or "tab" in problem:
        help = "indent with blanks, not tabs"
    elif "mapping values are not allowed" in problem:
        help = "a value that holds `: ` is written in quotes"
    elif "did not find expected ',' or" in problem:
        help = "inside {...} and [...], an expression that holds a comma is written in quotes"
    return Finding("TM1101", f"not well-formed YAML: {problem}", source.span(offset, offset + 1), help=help)


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
            raise Mistake("TM1105", f"specs have no tags such as `{event.tag}`", span, help="leave the tag out")
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
        if count > MAX_SPEC_VALUES:
            raise Mistake("TM1103", f"the spec holds more than {MAX_SPEC_VALUES} values", span)
        if anchor is not None:
            self._anchors[anchor] = (node, count)
        return node, count

    def _alias(self, event: Any, span: Span) -> tuple[YamlNode, int]:
        node, count = self._anchors.get(event.anchor, (None, -1))
        if node is None:
            why = "stands inside of its own anchor" if count == 0 else "has no anchor above it"
            raise Mistake("TM1105", f"the alias `*{event.anchor}` {why}", span)
        self._aliases += 1
        if self._aliases > MAX_ALIASES:
            raise Mistake("TM1103", f"the spec uses more than {MAX_ALIASES} aliases", span)
        return node, count

    def _scalar(self, event: Any, span: Span) -> YamlScalar:
        style = event.style if event.style in ("'", '"', "|", ">") else ""
        return YamlScalar(span, event.value, event.value if style else _core(event.value), style)

    def _list(self, event: Any, span: Span, depth: int) -> tuple[YamlList, int]:
        items, count = [], 1
        for inner in self._events:
            if isinstance(inner, yaml.SequenceEndEvent):
                span = self._source.span(span.start, inner.end_mark.index)
                break
            node, size = self._node(inner, depth + 1)
            items.append(node)
            count += size
        return YamlList(span, tuple(items), bool(event.flow_style)), count

    def _map(self, event: Any, span: Span, depth: int) -> tuple[YamlMap, int]:
        items: dict[str, tuple[YamlScalar, YamlNode]] = {}
        count = 1
        for inner in self._events:
            if isinstance(inner, yaml.MappingEndEvent):
                span = self._source.span(span.start, inner.end_mark.index)
                break
            key, _ = self._node(inner, depth + 1)
            if not isinstance(key, YamlScalar):
                raise Mistake("TM1105", "a key is a plain word", key.span)
            value, size = self._node(next(self._events), depth + 1)
            count += size + 1
            if key.text in items:
                first = items[key.text][0].span
                self._findings.append(
                    Finding("TM1102", f"the key `{key.text}` stands here a second time", key.span, help=f"first at {first}")
                )
                continue
            items[key.text] = (key, value)
        return YamlMap(span, tuple(items.values()), bool(event.flow_style)), count


def _core(text: str) -> None | bool | int | float | str:
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
