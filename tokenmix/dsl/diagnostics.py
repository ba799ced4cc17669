"""Findings: what is wrong with a text, where, why, and how to mend it. Rendering is separate from finding.

Every finding has an identifier from `CATALOGUE`; `docs/findings.md` shows each with a wrong text and its answer.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from tokenmix.dsl.source import Span

__all__ = [
    "CATALOGUE",
    "MAX_FINDINGS",
    "Finding",
    "FindingsError",
    "Mistake",
    "Note",
    "nearest",
    "render",
    "sort_findings",
]

# Identifier -> (slug, what it says in one line). Identifiers are never reused.
CATALOGUE: dict[str, tuple[str, str]] = {
    "TM1001": ("no-such-file", "the file does not exist or cannot be read"),
    "TM1002": ("not-text", "the file is not UTF-8 text"),
    "TM1003": ("empty-file", "the file holds nothing"),
    "TM1004": ("too-large", "the file or text is larger than any spec or block file needs to be"),
    "TM1005": ("unknown-spec", "no shipped spec has that name"),
    "TM1101": ("yaml-syntax", "the file is not well-formed YAML"),
    "TM1102": ("duplicate-key", "a map names the same key twice"),
    "TM1103": ("too-many-aliases", "anchors and aliases expand to more than the limit"),
    "TM1104": ("too-deep", "lists, maps or brackets are nested deeper than the limit"),
    "TM1105": ("yaml-feature", "a YAML feature that specs do not use"),
    "TM1106": ("mix-syntax", "the text is not a block definition or expression"),
    "TM1201": ("unknown-key", "a spec has no such key"),
    "TM1202": ("missing-key", "a required key is absent"),
    "TM1203": ("unknown-block", "no block or op has that name"),
    "TM1204": ("unknown-parameter", "the block, op or spec takes no such parameter"),
    "TM1205": ("missing-parameter", "a parameter without a default has no value"),
    "TM1206": ("unknown-name", "nothing of that name is defined here"),
    "TM1207": ("unused-name", "something is defined and never used"),
    "TM1208": ("duplicate-name", "the same name is defined twice"),
    "TM1209": ("cyclic-extends", "specs extend each other in a circle"),
    "TM1210": ("recursive-block", "a block contains itself"),
    "TM1211": ("reserved-name", "the name has a meaning of its own"),
    "TM1212": ("no-return", "a block does not end by returning its result"),
    "TM1301": ("wrong-type", "a value has another type than its parameter"),
    "TM1302": ("out-of-range", "a value lies outside its parameter's range"),
    "TM1303": ("not-whole", "a division must come out whole and does not"),
    "TM1304": ("bad-arithmetic", "the expression has no value"),
    "TM1305": ("number-too-large", "a number passes the limit"),
    "TM1306": ("argument-count", "too many or too few arguments"),
    "TM1401": ("wrong-kind", "an op does not take a value of this kind"),
    "TM1402": ("shape-mismatch", "values that are joined differ in shape"),
    "TM1403": ("requirement", "a requirement of the block does not hold"),
    "TM1404": ("input-size", "the architecture does not take this input size"),
    "TM1405": ("dead-value", "a value is computed and never reaches the output"),
    "TM1501": ("loop-too-long", "a compile-time loop passes the limit"),
    "TM1502": ("graph-too-large", "the model has more ops than the limit"),
    "TM1601": ("exact-target-missed", "a count differs from the exact figure the spec declares"),
    "TM1602": ("audit-mismatch", "fvcore's count of the emitted module differs from the analytic one"),
    "TM1701": ("would-overwrite", "the output file was not written by tokenmix"),
    "TM1702": ("not-emittable", "the definition cannot be printed as one class"),
    "TM1801": ("key-pattern", "a placeholder in a key of a layout cannot be matched or filled in"),
    "TM1802": ("unknown-layout", "no layout of checkpoints has that name"),
    "TM1803": ("layout-parts", "the entries that a layout joins to one weight are not numbered one by one"),
}

MAX_FINDINGS = 100  # of one block definition; what is wrong beyond them shows when some are mended


@dataclass(frozen=True)
class Note:
    """A second place that matters to a finding, with what it has to do with it."""

    message: str
    span: Span | None = None


@dataclass(frozen=True)
class Finding:
    """One mistake.

    Args:
        id: key of `CATALOGUE`.
        message: what is wrong, in the words of the spec.
        span: the characters to underline; None where there is no text (a missing file).
        label: a few words beside the underline.
        notes: other places and causes.
        help: how to mend it.
    """

    id: str
    message: str
    span: Span | None = None
    label: str = ""
    notes: tuple[Note, ...] = ()
    help: str = ""

    @property
    def slug(self) -> str:
        return CATALOGUE[self.id][0]


class Mistake(Exception):
    """Carries one finding from where it is noticed to where findings are collected.

    Attributes:
        about: the expression or call that has no value, whose names lead to the values at fault.
    """

    def __init__(self, id: str, message: str, span: Span | None = None, *, about: object = None, **details):
        super().__init__(message)
        self.finding = Finding(id, message, span, **details)
        self.about = about


class FindingsError(ValueError):
    """Raised by the library where a spec with findings is used. `findings` holds them; the text is their rendering."""

    def __init__(self, findings: Iterable[Finding]):
        self.findings = tuple(findings)
        super().__init__(render(self.findings, "text"))


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Known names close enough to `word` to be what was meant, best first.

    Example:
        >>> nearest("window_atention", ["window_attention", "linear"])
        ['window_attention']
    """
    known = list(known)
    if len(word) > 60:
        return []
    if len(known) > 300:
        known = [k for k in known if k[:1] == word[:1]][:300]
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.7)
    return near or [k for k in known if k.lower() == word.lower() or _swapped(k, word)]


def _swapped(a: str, b: str) -> bool:
    """Whether two short words differ by two neighbouring letters that changed places."""
    differ = [i for i in range(len(a)) if a[i] != b[i]] if len(a) == len(b) else []
    return (
        len(a) > 2
        and len(differ) == 2
        and differ[1] == differ[0] + 1
        and a[differ[0]] == b[differ[1]]
        and a[differ[1]] == b[differ[0]]
    )


def sort_findings(findings: Iterable[Finding]) -> list[Finding]:
    """By file and position, each distinct finding once."""

    def key(finding: Finding) -> tuple:
        span = finding.span
        return (span.source.name, span.start, finding.id) if span else ("", 0, finding.id)

    return sorted(dict.fromkeys(findings), key=key)


def render(findings: Iterable[Finding], format: str = "text") -> str:
    """Findings as text for people, `json` for programs or `github` workflow annotations."""
    findings = sort_findings(findings)
    if format == "json":
        import json

        return json.dumps({"schema": 1, "findings": [_as_dict(f) for f in findings]}, indent=2)
    if format == "github":
        return "\n".join(_as_github(f) for f in findings)
    return "\n\n".join(_as_text(f) for f in findings)


def _as_text(finding: Finding) -> str:
    lines = [f"error[{finding.id} {finding.slug}]: {_plain(finding.message)}"]
    span = finding.span
    gutter = ""
    if span is not None:
        line, column = span.position
        text = span.source.line(line)
        gutter = " " * len(str(line))
        lines.append(f"{gutter}--> {_plain(str(span))}")
        if text.strip():
            width = max(1, min(span.end - span.start, len(text) - column + 1))
            shown, pointer = _clip(text, column - 1, width)
            blanks = " " * _columns(shown[:pointer])
            carets = "^" * max(1, _columns(shown[pointer : pointer + width]))
            lines += [
                f"{gutter} |",
                f"{line} | {shown}",
                f"{gutter} | {blanks}{carets} {_plain(finding.label)}".rstrip(),
            ]
            if finding.notes or finding.help:
                lines.append(f"{gutter} |")
    for note in finding.notes:
        where = f" ({_plain(str(note.span))})" if note.span else ""
        lines.append(f"{gutter} = {_plain(note.message)}{where}")
    if finding.help:
        lines.append(f"{gutter} = help: {_plain(finding.help)}")
    return "\n".join(lines)


def _plain(text: str, longest: int = 600) -> str:
    """A text from a spec as it may stand in a line on a terminal: nothing that steers it, and not without end."""
    if len(text) > longest:
        text = f"{text[: longest - 60]} ... {text[-40:]}"
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    )


def _clip(text: str, column: int, width: int, longest: int = 140) -> tuple[str, int]:
    """A long line cut to the part around the underlined characters, tabs as single blanks."""
    text = _plain(text.replace("\t", " "), len(text))
    if len(text) <= longest:
        return text, column
    start = max(0, min(column - longest // 3, len(text) - longest))
    return ("... " if start else "") + text[start : start + longest], column - start + (4 if start else 0)


def _columns(text: str) -> int:
    """Columns that a text takes on a terminal: two for a wide East Asian character, none for a combining one."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _as_dict(finding: Finding) -> dict:
    def place(span: Span | None) -> dict | None:
        if span is None:
            return None
        line, column = span.position
        end_line, end_column = span.source.position(span.end)
        return {
            "file": span.source.name,
            "line": line,
            "column": column,
            "end_line": end_line,
            "end_column": end_column,
        }

    return {
        "id": finding.id,
        "slug": finding.slug,
        "message": finding.message,
        "place": place(finding.span),
        "label": finding.label,
        "notes": [{"message": n.message, "place": place(n.span)} for n in finding.notes],
        "help": finding.help,
    }


def _as_github(finding: Finding) -> str:
    def escaped(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    text = _plain(finding.message) + (f"\n{_plain(finding.help)}" if finding.help else "")
    title = f"{finding.id} {finding.slug}"
    if finding.span is None:
        return f"::error title={title}::{escaped(text)}"
    line, column = finding.span.position
    name = escaped(_plain(finding.span.source.name)).replace(":", "%3A").replace(",", "%2C")
    return f"::error file={name},line={line},col={column},title={title}::{escaped(text)}"
