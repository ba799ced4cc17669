"""Canonical text of specs: YAML in one order and one layout, expressions as the block formatter prints them."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import yaml

from tokenmix.dsl.diagnostics import Finding, FindingsError, Mistake
from tokenmix.dsl.formatter import format_blocks, format_expression, format_loop
from tokenmix.dsl.layout import LINE_WIDTH, Comment, Group, Line, Piece, arrange, attach, comment_at, joined
from tokenmix.dsl.parser import parse_expression, parse_loop
from tokenmix.dsl.source import Source
from tokenmix.dsl.yaml_reader import YamlList, YamlMap, YamlNode, YamlScalar, read_yaml

__all__ = ["format_spec"]

_INDENT = 2
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Texts with the place of a scalar in them, to try how it reads there.
_ENTRY, _VALUE, _KEY = "- {}", "k: {}", "{}: v"
_FLOW_ENTRY, _FLOW_VALUE, _FLOW_KEY = "[{}]", "{{k: {}}}", "{{{}: v}}"
# Top-level keys under which every text is an expression.
_EXPRESSIONS = ("stem", "stages", "features", "head", "init")


def format_spec(source: Source, key_order: Sequence[str], width: int = LINE_WIDTH) -> str:
    """Canonical text of a spec.

    Top-level keys come in the given order, each with the comments above it; other keys keep their places. Lists and
    maps in brackets stay in brackets where they fit the line and hold no comment. Texts lose quotes they do not need
    and get double quotes where they need some; a text in quotes that is the value of a parameter keeps them, since
    without them it would be an expression. Numbers stay as they were written, `definitions` are formatted as a block
    file.

    Expressions are printed canonically wherever a text can be nothing else: blocks, stages, initialisations,
    parameters with a type of numbers. A value under `with` may be a word of the extended spec's choosing, so only one
    with brackets is taken for an expression.

    A spec with anchors or aliases keeps its layout: blanks at line ends go, a missing line break at the end comes.

    Args:
        source: the spec.
        key_order: top-level keys in the order in which they are printed; others follow.
        width: longest line, columns. Single texts are never broken.

    Raises:
        FindingsError: if the text is not the YAML of a spec, or its definitions cannot be parsed.
    """
    findings: list[Finding] = []
    root = read_yaml(source, findings)
    if root is not None and not isinstance(root, YamlMap):
        findings.append(Finding("TM1101", "a spec is a map of keys and values", root.span))
    if findings:
        raise FindingsError(findings)
    tokens = _Tokens(source.text)
    if not isinstance(root, YamlMap) or tokens.anchored:
        return tokens.without_blanks()
    flattener = _Flattener(root, tokens, width)
    flattener.map(root, 0, ())
    code = tokens.code(flattener.closers)
    tail = attach(flattener.lines, tokens.comments, source.text, code)
    return joined(_sorted(arrange(flattener.lines, tail, width), key_order))


def _sorted(groups: list[Group], key_order: Sequence[str]) -> list[Group]:
    """Groups by key, between the comments that open the file and those that close it."""
    *keyed, tail = groups
    header = Group(None)
    if keyed:
        first = keyed[0].entries
        above = len([c for c in keyed[0].line.above if not c.indent]) if keyed[0].line else 0
        end = max((i for i in range(1, above + 1) if first[i][0]), default=0)
        header.entries, keyed[0].entries = first[:end], first[end:]
    place = {key: i for i, key in enumerate(key_order)}
    keyed.sort(key=lambda group: place.get(group.line.name if group.line else "", len(place)))
    if keyed and header.entries:
        keyed[0].part()
    return [header, *keyed, tail]


class _Tokens:
    """What the tree of a spec does not say: comments, dashes, and what else stands between the values."""

    def __init__(self, text: str):
        self.text = text
        self.comments: list[Comment] = []
        self.dashes: list[int] = []
        self.anchored = False
        self._markers: list[tuple[int, int]] = []  # `---`, `...` and directives
        self._scalars: list[tuple[int, int]] = []
        end = 0
        for token in yaml.scan(text, Loader=_Loader):
            start, behind = token.start_mark.index, token.end_mark.index
            self._find_comments(end, start)
            end = max(end, behind)
            if isinstance(token, yaml.ScalarToken):
                self._scalars.append((start, behind))
                if token.style in ("|", ">"):
                    line_end = text.find("\n", start)
                    self._find_comments(start, line_end if line_end >= 0 else len(text))
            elif isinstance(token, yaml.BlockEntryToken):
                self.dashes.append(start)
            elif isinstance(token, yaml.DirectiveToken | yaml.DocumentStartToken | yaml.DocumentEndToken):
                self._markers.append((start, behind))
            elif isinstance(token, yaml.AnchorToken | yaml.AliasToken):
                self.anchored = True
        self._find_comments(end, len(text))

    def _find_comments(self, start: int, end: int) -> None:
        for match in re.compile("#[^\n]*").finditer(self.text, start, end):
            self.comments.append(comment_at(self.text, match.start(), match.end()))

    def dash(self, start: int) -> int:
        """Offset of the dash in front of a list entry that begins at `start`."""
        return self.dashes[bisect_left(self.dashes, start) - 1]

    def commented(self, node: YamlNode) -> bool:
        """Whether a comment stands inside a list or map."""
        first = bisect_left(self.comments, node.span.start, key=lambda c: c.start)
        return first < len(self.comments) and self.comments[first].start < node.span.end

    def code(self, closers: list[int]) -> str:
        """The text with blanks for comments, markers and the brackets at `closers`, which are not printed."""
        parts = list(self.text)
        stretches = [(c.start, c.start + len(c.text)) for c in self.comments]
        for start, end in [*stretches, *self._markers, *((c, c + 1) for c in closers)]:
            parts[start:end] = " " * (end - start)
        return "".join(parts)

    def without_blanks(self) -> str:
        """The text without blanks at line ends, save in scalars where they may count."""
        blanks = list(re.finditer(r"[ \t]+$", self.text, re.M))
        kept = iter(self._scalars)
        scalar = next(kept, None)
        parts, end = [], 0
        for match in blanks:
            while scalar and scalar[1] <= match.start():
                scalar = next(kept, None)
            if not scalar or match.end() <= scalar[0]:
                parts.append(self.text[end : match.start()])
                end = match.end()
        text = "".join([*parts, self.text[end:]])
        return text if text.endswith("\n") or not text else text + "\n"


class _Flattener:
    """Turns the tree of a spec into lines. `closers` are the brackets that end lists and maps printed without them."""

    def __init__(self, root: YamlMap, tokens: _Tokens, width: int):
        self.lines: list[Line] = []
        self.closers: list[int] = []
        self._root = root
        self._tokens = tokens
        self._width = width
        self._dashes: tuple[int, int, str] | None = None  # start, column and text of dashes that wait for their entry

    def map(self, node: YamlMap, indent: int, path: tuple[str, ...]) -> None:
        """Print a map without braces, every key on a line."""
        for key, value in node.items:
            head = _plain_or_quoted(key, key.text, _KEY) + ":"
            self._entry(head, value, key.span.start, indent, (*path, key.text))
        self._close(node)

    def _list(self, node: YamlList, indent: int, path: tuple[str, ...]) -> None:
        for item in node.items:
            start = item.span.start if node.flow else self._tokens.dash(item.span.start)
            self._entry("-", item, start, indent, path)
        self._close(node)

    def _close(self, node: YamlList | YamlMap) -> None:
        if node.flow:
            self.closers.append(node.span.end - 1)

    def _entry(self, head: str, value: YamlNode, start: int, indent: int, path: tuple[str, ...]) -> None:
        template = _ENTRY if head == "-" else _VALUE
        if isinstance(value, YamlScalar):
            text, body = self._scalar(value, path, template, indent + _INDENT)
            self._line(f"{head} {text}".rstrip(), start, indent, path, body)
            return
        brackets = self._brackets(value, path) if value.flow or not value.items else None
        if brackets is not None and indent + len(head) + 1 + len(brackets) <= self._width:
            self._line(f"{head} {brackets}", start, indent, path)
            return
        if head == "-":
            first, column, dashes = self._dashes or (start, indent, "")
            self._dashes = (first, column, dashes + "- ")
        else:
            self._line(head, start, indent, path)
        if isinstance(value, YamlMap):
            self.map(value, indent + _INDENT, path)
        else:
            self._list(value, indent + _INDENT, path)

    def _line(self, text: str, start: int, indent: int, path: tuple[str, ...], body: tuple[str, ...] = ()) -> None:
        if self._dashes:
            start, indent, dashes = self._dashes
            text, self._dashes = dashes + text, None
        self.lines.append(Line(indent, [Piece(text)], start, path[0], body=body))

    def _brackets(self, node: YamlNode, path: tuple[str, ...]) -> str | None:
        """A list or map in brackets, or None where a comment keeps it from being one line."""
        if isinstance(node, YamlScalar):
            return self._text(node, path, _FLOW_ENTRY) or "null"
        if node.items and self._tokens.commented(node):
            return None
        if isinstance(node, YamlList):
            return f"[{', '.join(self._brackets(item, path) or '' for item in node.items)}]"
        pairs = []
        for key, value in node.items:
            inner = self._brackets(value, (*path, key.text))
            if isinstance(value, YamlScalar):
                inner = self._text(value, (*path, key.text), _FLOW_VALUE) or "null"
            pairs.append(f"{_plain_or_quoted(key, key.text, _FLOW_KEY)}: {inner}")
        return "{" + ", ".join(pairs) + "}"

    # Scalars

    def _scalar(
        self, node: YamlScalar, path: tuple[str, ...], template: str, indent: int
    ) -> tuple[str, tuple[str, ...]]:
        """Text of a scalar on its line, and the rows below it."""
        text = node.text
        if path == ("definitions",) and isinstance(node.value, str):
            text = format_blocks(node.source, self._width - indent) or text
        if node.style in ("|", ">") or text != node.text:
            for header, rows in _block_styles(node, text):
                body = tuple(" " * indent + row if row else "" for row in rows)
                if _reads_as("\n".join([f"k: {header}", *(" " * _INDENT + r if r else "" for r in rows)]) + "\n", text):
                    return header, body
            return _quoted(text), ()
        return self._text(node, path, template), ()

    def _text(self, node: YamlScalar, path: tuple[str, ...], template: str) -> str:
        text = self._canonical(node, path)
        if isinstance(node.value, str) and node.style in ("'", '"') and self._is_value(path):
            return _quoted(text)
        return _plain_or_quoted(node, text, template)

    def _is_value(self, path: tuple[str, ...]) -> bool:
        """Whether a place holds the value of a parameter: there, quotes tell texts from expressions."""
        if path[0] == "parameters":
            return len(path) == 2 or path[2:] in (("default",), ("length",))
        return path[0] == "with"

    def _canonical(self, node: YamlScalar, path: tuple[str, ...]) -> str:
        """Text of a scalar, printed anew if it is an expression."""
        if not isinstance(node.value, str):
            return node.text
        if path[0] in _EXPRESSIONS:
            if path == ("stages", "for"):
                return _printed(parse_loop, format_loop, node)
            return _printed(parse_expression, format_expression, node)
        if path[0] == "with" and not node.style and re.search(r"[(\[]", node.text):
            return _printed(parse_expression, format_expression, node)
        if path[0] == "parameters" and self._is_value(path) and self._is_expression(node, path):
            return _printed(parse_expression, format_expression, node)
        return node.text

    def _is_expression(self, node: YamlScalar, path: tuple[str, ...]) -> bool:
        parameters = self._root.get(path[0])
        declared = parameters.get(path[1]) if isinstance(parameters, YamlMap) else None
        if path[2:] == ("default",) and isinstance(declared, YamlMap):
            type_ = declared.get("type")
            if isinstance(type_, YamlList) and type_.items:
                type_ = type_.items[0]
            if isinstance(type_, YamlScalar):
                return type_.text.strip("[] ") != "str"
            if "choices" in declared:
                return False
        return not node.style  # without a type, a text in quotes is a text


def _printed(parse: Callable[[Source], Any], print_: Callable[..., str], node: YamlScalar) -> str:
    if "#" in node.text:
        return node.text  # the expression may have a comment in it
    try:
        return print_(parse(Source("", node.text)), equals="=")
    except Mistake:
        return node.text


def _block_styles(node: YamlScalar, text: str) -> list[tuple[str, list[str]]]:
    """Ways to write a text in several lines: what stands behind the key, and the rows below it without indentation."""
    if node.style == ">":
        source = node.span.source.text
        header, *rows = source[node.span.start : node.span.end].split("\n")
        header = header.split("#")[0].strip()
        while rows and not rows[-1].strip() and "+" not in header:
            rows.pop()
        first = next((row for row in rows if row.strip()), "")
        indent = len(first) - len(first.lstrip(" "))
        rows = [row[indent:] for row in rows]
        return [(header, rows[:-1] if rows and not rows[-1] else rows)]
    chomping = "+" if text.endswith("\n\n") else "" if text.endswith("\n") else "-"
    rows = text.removesuffix("\n").split("\n")
    return [("|" + chomping, rows), (f"|{_INDENT}{chomping}", rows)]


def _plain_or_quoted(node: YamlScalar, text: str, template: str) -> str:
    """A scalar without quotes if it reads the same at its place, else in double quotes."""
    if not isinstance(node.value, str):
        return text
    # A backslash reads the same without quotes, but not in every place it may be moved to.
    plain = text.isprintable() and "\\" not in text and _reads_plain(template, text)
    return text if plain else _quoted(text)


@lru_cache(maxsize=4096)
def _reads_plain(template: str, text: str) -> bool:
    root = read_yaml(Source("", template.format(text) + "\n"), [])
    if not isinstance(root, YamlMap | YamlList) or len(root.items) != 1:
        return False
    scalar: YamlNode
    if isinstance(root, YamlMap):
        scalar = root.items[0][0 if template in (_KEY, _FLOW_KEY) else 1]
    else:
        scalar = root.items[0]
    return isinstance(scalar, YamlScalar) and not scalar.style and scalar.value == text


def _reads_as(document: str, text: str) -> bool:
    root = read_yaml(Source("", document), [])
    value = root.items[0][1] if isinstance(root, YamlMap) and root.items else None
    return isinstance(value, YamlScalar) and value.text == text


def _quoted(text: str) -> str:
    # JSON leaves a few characters bare that break lines in YAML or cannot be seen.
    bare = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff]", lambda m: f"\\u{ord(m.group()):04x}", bare)
