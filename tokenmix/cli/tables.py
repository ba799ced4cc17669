"""Tables in the formats that every report speaks."""

from __future__ import annotations

import csv
import io
import os
import shutil
import sys
from collections.abc import Sequence

__all__ = ["FORMATS", "bold", "giga", "mega", "megabytes", "shape", "table"]

FORMATS = ("table", "json", "csv", "markdown", "github")


def giga(count: int) -> str:
    return f"{count / 1e9:.3f}"


def mega(count: int) -> str:
    return f"{count / 1e6:.3f}"


def megabytes(count: int) -> str:
    return f"{count / 2**20:.1f}"


def shape(dims: Sequence[int]) -> str:
    return "x".join(str(d) for d in dims)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], format: str, *, left: Sequence[int] = (0,)) -> str:
    """Rows under a head. Columns in `left` are texts, the others numbers, aligned right.

    On a narrow terminal texts are cut; a pipe gets every column whole.
    """
    if format == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([head, *rows])
        return out.getvalue().rstrip("\n")
    if format == "markdown":
        marks = [":--" if i in left else "--:" for i in range(len(head))]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, marks, *rows])
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    if sys.stdout.isatty():
        spare = shutil.get_terminal_size().columns - sum(widths) - 2 * (len(widths) - 1)
        widest = max(left, key=lambda i: widths[i], default=0)
        if spare < 0:
            widths[widest] = max(8, widths[widest] + spare)

    def line(cells: Sequence[str]) -> str:
        cut = [c if len(c) <= w else c[: w - 1] + "…" for c, w in zip(cells, widths, strict=True)]
        return "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cut, widths, strict=True))
        ).rstrip()

    return "\n".join([bold(line(head)), *(line(r) for r in rows)])


def bold(text: str) -> str:
    """Emphasis on a terminal; plain in a pipe or where NO_COLOR is set."""
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        return f"\033[1m{text}\033[0m"
    return text
