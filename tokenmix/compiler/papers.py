"""The tables of the papers as the shipped specs reproduce them: printed figures beside computed ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from tokenmix.compiler.model import Model
from tokenmix.compiler.plan import make_draft
from tokenmix.compiler.report import Figure, figures_of
from tokenmix.compiler.spec import UNITS, Published, Spec, shipped_specs
from tokenmix.compiler.spec_reader import read_spec
from tokenmix.dsl.diagnostics import Finding, FindingsError

__all__ = ["OUTCOMES", "Line", "lines_of", "papers", "tally", "title_of"]

# What may come of a printed figure -> how summaries say it.
OUTCOMES = {"rounds": "round", "cut off": "cut off", "explained": "off with a note", "unexplained": "unexplained"}


@dataclass(frozen=True)
class Line:
    """A printed row beside what its spec gives.

    Attributes:
        spec: name of the spec.
        shape: (channels, height, width) of the image.
        params, flops: exact integers; FLOPs under the row's convention.
        figures: the printed parameters and FLOPs, by quantity, where there are any.
        others: further columns as printed, such as top1.
    """

    paper: str
    table: str
    row: str
    spec: str
    shape: tuple[int, int, int]
    dense: bool
    rule: str
    params: int
    flops: int
    figures: Mapping[str, Figure]
    others: Mapping[str, str]
    note: str
    is_reconstruction: bool


@cache
def _printed() -> dict[str, list[tuple[str, Published]]]:
    """Paper -> the rows that its tables print, each with the name of its spec. Nothing is evaluated."""
    found: dict[str, list[tuple[str, Published]]] = {}
    for name in shipped_specs():
        spec, _ = _read(name)
        for row in spec.published if not spec.is_family else ():
            found.setdefault(row.paper or spec.family, []).append((name, row))
    return found


@cache
def _read(name: str) -> tuple[Spec, list[Finding]]:
    findings: list[Finding] = []
    spec = read_spec(shipped_specs()[name], findings)
    if spec is None:
        raise FindingsError(findings)
    return spec, findings


@cache
def _model(name: str) -> Model:
    spec, found = _read(name)
    findings = list(found)
    return Model(spec, make_draft(spec, {}, findings), findings, name, {})


def papers() -> dict[str, int]:
    """Paper -> the number of rows that shipped specs have from its tables, in alphabetical order."""
    return {paper: len(rows) for paper, rows in sorted(_printed().items())}


def title_of(paper: str) -> str:
    """Title and venue of a paper; its name where no family is called so."""
    about = _read(paper)[0].paper if paper in shipped_specs() else {}
    venue = f" ({about['venue']})" if "venue" in about else ""
    return about.get("title", paper) + venue


def lines_of(paper: str) -> dict[str, list[Line]]:
    """Table -> its rows. Raises `FindingsError` where a spec is wrong."""
    tables: dict[str, list[Line]] = {}
    for name, row in sorted(_printed()[paper], key=lambda pair: _natural(pair[1].table)):
        model = _model(name)
        shape = row.input or model.input_shape
        cost = model.cost(shape[1:], dense=row.dense)
        assert model.spec is not None
        figures = {f.quantity: f for f in figures_of(row, cost)}
        others = {key: text for key, text in row.printed.items() if key not in UNITS}
        line = Line(
            paper, row.table, row.row or name, name, shape, row.dense, row.rule, cost.params, cost[row.rule],
            figures, others, row.note, model.spec.status.is_reconstruction,
        )  # fmt: skip
        tables.setdefault(row.table, []).append(line)
    # Papers list small models first; the order of the specs' names would put B before T.
    return {table: sorted(lines, key=lambda n: (n.params, n.shape, n.flops)) for table, lines in tables.items()}


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """A key that sorts 10 behind 9."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", text) if part
    ]


def tally(lines: Iterable[Line]) -> dict[str, int]:
    """How many printed parameter and FLOP figures there are, by `OUTCOMES`."""
    counts = Counter(
        figure.status if figure.status != "off" else "explained" if figure.note else "unexplained"
        for line in lines
        for figure in line.figures.values()
    )
    return {outcome: counts[outcome] for outcome in OUTCOMES}
