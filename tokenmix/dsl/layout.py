"""Lines of code with the comments that belong to them, laid out within a width; block files and specs share it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["INDENT", "LINE_WIDTH", "Comment", "Group", "Line", "Piece", "arrange", "attach", "comment_at", "joined"]

LINE_WIDTH = 120  # columns, without a comment behind the code
INDENT = 4


@dataclass
class Comment:
    """A comment of the source.

    Args:
        start: offset of its `#`.
        text: from `#` to the last visible character.
        column: where it begins in its line, from 0.
        own_line: whether nothing stands in front of it.
        blank: whether an empty line stands above it; later, whether one is printed.
        indent: column at which it is printed.
    """

    start: int
    text: str
    column: int
    own_line: bool
    blank: bool
    indent: int = 0


@dataclass
class Piece:
    """A part of a line in front of which the line may be broken; unbroken, a blank stands there.

    Args:
        text: the code.
        rank: breaks of the lowest rank are tried first.
        start: offset in the source of a stage that may carry comments of its own, else -1.
        above: comments on lines of their own in front of it.
        trailing: the comment behind it.
    """

    text: str = ""
    rank: int = 0
    start: int = -1
    above: list[Comment] = field(default_factory=list)
    trailing: Comment | None = None


@dataclass
class Line:
    """A line of code before it is broken.

    Args:
        indent: column at which it is printed.
        pieces: its parts, at least one.
        start: offset of its first character in the source.
        name: what a line without indentation defines.
        head: whether it opens a suite of statements.
        body: rows printed below it as they are (a literal text of YAML).
        above: comments on lines of their own in front of it.
        blank: whether an empty line stands above it in the source; later, whether one is printed.
    """

    indent: int
    pieces: list[Piece]
    start: int
    name: str = ""
    head: bool = False
    body: tuple[str, ...] = ()
    above: list[Comment] = field(default_factory=list)
    blank: bool = False


@dataclass
class Group:
    """A line without indentation with all that belongs to it: its comments, its suite. `line` is None at the end.

    `entries` are rows, each with whether an empty line goes in front of them.
    """

    line: Line | None
    entries: list[tuple[bool, list[str]]] = field(default_factory=list)

    def part(self) -> None:
        """Put an empty line in front."""
        if self.entries:
            self.entries[0] = (True, self.entries[0][1])


def comment_at(text: str, start: int, end: int) -> Comment:
    """The comment between two offsets of a text."""
    before = text[text.rfind("\n", 0, start) + 1 : start]
    column = len(before.expandtabs(INDENT))
    return Comment(start, text[start:end].rstrip(), column, not before.strip(), _blank_above(text, start))


def attach(lines: list[Line], comments: list[Comment], text: str, code: str) -> list[Comment]:
    """Give every comment to a line, in order, and return those behind the last line.

    Args:
        lines: all lines in the order of the source.
        comments: all comments in that order.
        text: the source.
        code: the source with blanks in place of comments.
    """
    stops = list(_stops(lines))
    starts = [*(stop.start for stop in stops), len(text)]
    numbers = [bisect_left(comments, start, key=lambda c: c.start) for start in starts]
    late = comments[: numbers[0]]
    levels: list[tuple[int, int]] = []  # printed and written column of every suite that is open
    for i, (line, first, last, start) in enumerate(stops):
        begins = first is line.pieces[0]
        opened = begins and bool(levels) and levels[-1][0] < line.indent
        if begins:
            column = comment_at(text, start, start).column
            line.above = _settled(late, levels, line.indent, column)
            line.blank = _blank_above(text, start)
            levels = [*(level for level in levels if level[0] < line.indent), (line.indent, column)]
        else:
            first.above = late
        stretch = code[start : starts[i + 1]].rstrip()
        if last is not line.pieces[-1]:
            stretch = stretch.removesuffix("|>").rstrip()
        inside, late = _shared_out(comments[numbers[i] : numbers[i + 1]], start + len(stretch), text)
        if line.head and (len(inside) > 1 or any(c.own_line for c in inside)):
            inside, late = [], inside + late
        if inside and not inside[-1].own_line:
            last.trailing = inside.pop()
        if inside and begins:
            inside[0].blank, line.blank = line.blank, False
            for comment in inside:
                comment.indent = line.indent
            line.above += inside
        else:
            first.above += inside
        if opened and line.above:
            line.above[0].blank = False
        elif opened:
            line.blank = False
    return _settled(late, levels, 0, 0)


class _Stop(NamedTuple):
    """A stretch of a line that has comments of its own: its first and last piece, and where it begins."""

    line: Line
    first: Piece
    last: Piece
    start: int


def _stops(lines: Iterable[Line]) -> Iterator[_Stop]:
    for line in lines:
        cuts = [i for i, piece in enumerate(line.pieces) if i == 0 or piece.start >= 0]
        for a, b in zip(cuts, [*cuts[1:], len(line.pieces)], strict=True):
            yield _Stop(line, line.pieces[a], line.pieces[b - 1], line.pieces[a].start if a else line.start)


def _shared_out(comments: list[Comment], end: int, text: str) -> tuple[list[Comment], list[Comment]]:
    """Comments in or right behind a stretch of code that ends at `end`, and those on later lines."""
    inside = [c for c in comments if c.start < end]
    late = comments[len(inside) :]
    if late and "\n" not in text[end : late[0].start]:
        inside.append(late.pop(0))
    for comment in inside:
        comment.blank = False
    return inside, late


def _settled(comments: list[Comment], levels: list[tuple[int, int]], indent: int, column: int) -> list[Comment]:
    """Set the columns of comments in front of a line: that line's, or that of a suite which ends here."""
    deepest = max((level for level, _ in levels), default=indent)
    for comment in comments:
        open_levels = [p for p, written in levels if indent < p <= deepest and column < comment.column >= written]
        comment.indent = deepest = max(open_levels, default=indent)
    return comments


def arrange(lines: list[Line], tail: list[Comment], width: int = LINE_WIDTH) -> list[Group]:
    """Rows of all lines and their comments, one group per line without indentation."""
    groups: list[Group] = []

    def add(comments: Iterable[Comment]) -> None:
        groups[-1].entries += [(c.blank, [" " * c.indent + c.text]) for c in comments]

    for line in lines:
        if line.indent == 0:
            if groups:
                add(c for c in line.above if c.indent)
            groups.append(Group(line))
            add(c for c in line.above if not c.indent)
        else:
            add(line.above)
        groups[-1].entries.append((line.blank, _rows(line, width)))
    if groups:
        add(c for c in tail if c.indent)
    groups.append(Group(None))
    add(c for c in tail if not c.indent)
    return groups


def joined(groups: Iterable[Group]) -> str:
    """The text of groups, with at most one empty line between rows."""
    rows: list[str] = []
    for group in groups:
        for blank, texts in group.entries:
            if blank and rows and rows[-1]:
                rows.append("")
            rows += texts
    return "".join(row + "\n" for row in rows)


def _rows(line: Line, width: int) -> list[str]:
    # Below a head, what goes on would read like the suite if it were not indented further.
    hanging = line.indent + (2 * INDENT if line.head else INDENT)
    chunks: list[list[Piece]] = [[]]
    for piece in line.pieces:
        if chunks[-1] and (piece.above or chunks[-1][-1].trailing):
            chunks.append([])
        chunks[-1].append(piece)
    rows: list[str] = []
    for i, chunk in enumerate(chunks):
        indent = hanging if i else line.indent
        rows += [" " * hanging + comment.text for comment in chunk[0].above]
        first, *others = _filled(chunk, width - indent, width - hanging)
        rows += [" " * indent + first, *(" " * hanging + other for other in others)]
        comment = chunk[-1].trailing
        if comment:
            rows[-1] += "  " + comment.text
    return [*rows, *line.body]


def _filled(pieces: list[Piece], room: int, rest: int) -> list[str]:
    """Pieces in lines: `room` columns in the first one, `rest` in the others."""
    flat = " ".join(p.text for p in pieces)
    if len(flat) <= room or len(pieces) == 1:
        return [flat]
    rank = min(p.rank for p in pieces[1:])
    cuts = [i for i, p in enumerate(pieces) if i and p.rank == rank]
    first, *units = (pieces[a:b] for a, b in zip([0, *cuts], [*cuts, len(pieces)], strict=True))
    lines = _filled(first, room, rest)
    for unit in units:
        longer = lines[-1] + " " + " ".join(p.text for p in unit)
        if len(longer) <= (rest if len(lines) > 1 else room):
            lines[-1] = longer
        else:
            lines += _filled(unit, rest, rest)
    return lines


def _blank_above(text: str, start: int) -> bool:
    line = text.rfind("\n", 0, start) + 1
    return line > 0 and not text[text.rfind("\n", 0, line - 1) + 1 : line].strip()
