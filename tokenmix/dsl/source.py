"""Texts and places in them: every value of a spec and every node of a block knows the characters it came from."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["EmbeddedSource", "Source", "Span"]


@dataclass(frozen=True, eq=False)
class Source:
    """A text and the name it is shown under.

    Args:
        name: path as the user wrote it, or a label such as `<with>` for values that came from a call.
        text: the whole text, decoded.
    """

    name: str
    text: str
    _starts: list[int] = field(default_factory=list, repr=False)

    def span(self, start: int, end: int) -> Span:
        """The characters from `start` up to `end` of this text."""
        length = len(self.text)
        start = min(start, length)
        return Span(self, start, min(max(end, start), length))

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of a character, both counted from 1."""
        if not self._starts:
            self._starts.extend([0, *(i + 1 for i, ch in enumerate(self.text) if ch == "\n")])
        line = bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def line(self, number: int) -> str:
        """Text of one line (from 1), without its line break."""
        self.position(0)
        start = self._starts[number - 1]
        end = self._starts[number] if number < len(self._starts) else len(self.text)
        return self.text[start:end].rstrip("\r\n")

    @property
    def folder(self) -> Path:
        """The folder the text lies in, where neighbours such as an `extends` base are looked for."""
        return Path(self.name).parent


class EmbeddedSource(Source):
    """A text cut out of another one (a quoted expression, a literal block): its spans point into the outer text.

    Args:
        outer: the text it was cut from.
        text: the inner text.
        starts: for every line of the inner text, the offset of its first character in the outer text; or, with
            `every_character`, the offset of every character and of the end.
    """

    def __init__(self, outer: Source, text: str, starts: list[int], *, every_character: bool = False):
        super().__init__(outer.name, text)
        object.__setattr__(self, "outer", outer)
        object.__setattr__(self, "_outer_starts", starts)
        object.__setattr__(self, "_every_character", every_character)

    outer: Source
    _outer_starts: list[int]
    _every_character: bool

    def span(self, start: int, end: int) -> Span:
        outer_start = self._outer_offset(start)
        return self.outer.span(outer_start, max(outer_start, self._outer_offset(end)))

    def _outer_offset(self, offset: int) -> int:
        starts = self._outer_starts
        if self._every_character:
            return starts[min(offset, len(starts) - 1)]
        line, column = self.position(offset)
        return min(starts[min(line, len(starts)) - 1] + column - 1, len(self.outer.text))


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of characters in a source, from `start` up to and without `end`."""

    source: Source
    start: int
    end: int

    @property
    def position(self) -> tuple[int, int]:
        """Line and column of the first character, from 1."""
        return self.source.position(self.start)

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def __str__(self) -> str:
        line, column = self.position
        return f"{self.source.name}:{line}:{column}"

    def __repr__(self) -> str:
        return f"Span({self})"
