"""`tokenmix table`: the tables of a paper as reproduced, printed figures beside computed ones. Needs no torch."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tokenmix.cli.tables import bold, giga, mega, shape, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tokenmix.compiler.papers import Line

_DOC = """A printed figure *rounds* (the computed one rounds to it), is *cut off* (the digits of the computed one begin
with it), or is *off* by so much. FLOPs are computed under the convention that the row is printed in.
Without PAPER, the papers are listed.

example: tokenmix table mixformer --format markdown"""

_INTRODUCTION = """\
A figure *rounds* if the computed one rounds to it, is *cut off* if the digits of the computed one begin with it, and is
*off* otherwise. FLOPs are computed under the convention that stands beside them. Columns that are neither parameters
nor FLOPs are as printed. This page is what `tokenmix table --all --format markdown` prints."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _DOC
    parser.add_argument("paper", metavar="PAPER", nargs="?", help="name of the family whose paper it is")
    parser.add_argument("--all", action="store_true", help="the tables of every paper")
    parser.add_argument(
        "--format", choices=("text", "markdown", "csv", "json"), default="text",
        help="form of the tables; csv and json hold exact integers",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from tokenmix.compiler.papers import lines_of, papers
    from tokenmix.dsl.diagnostics import nearest

    known = papers()
    if options.paper is not None and options.paper not in known:
        near = nearest(options.paper, known)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known)}"
        print(f"error: no shipped spec has rows of a paper `{options.paper}`; {hint}", file=sys.stderr)
        return 1
    chosen = [options.paper] if options.paper else list(known)
    found = {paper: lines_of(paper) for paper in chosen}
    if options.paper is None and not options.all:
        print(_papers(found, options.format))
    elif options.format == "json":
        print(_json(found))
    elif options.format == "csv":
        print(_csv(found))
    else:
        print(page(found, options.format))
    return 0


def _all(tables: Mapping[str, Sequence[Line]]) -> list[Line]:
    return [line for lines in tables.values() for line in lines]


def _papers(found: Mapping[str, Mapping[str, Sequence[Line]]], format: str) -> str:
    from tokenmix.compiler.papers import OUTCOMES, tally, title_of

    if format == "json":
        import json

        rows = {paper: {"rows": len(_all(tables)), **tally(_all(tables))} for paper, tables in found.items()}
        return json.dumps({"schema": 1, "papers": rows}, indent=2)
    cells = []
    for paper, tables in found.items():
        counts = tally(_all(tables))
        numbers = [len(tables), len(_all(tables)), sum(counts.values()), *counts.values()]
        cells.append([paper, *map(str, numbers), title_of(paper)])
    head = ["paper", "tables", "rows", "figures", *OUTCOMES.values(), "title"]
    return table(head, cells, format if format != "text" else "table", left=(0, len(head) - 1))


def headline(found: Mapping[str, Mapping[str, Sequence[Line]]]) -> str:
    """How many figures of all papers are met, in one sentence."""
    from tokenmix.compiler.papers import tally

    counts = tally(line for tables in found.values() for line in _all(tables))
    return (
        f"Of {sum(counts.values())} printed parameter and FLOP figures of classification models and their ablations "
        f"in {len(found)} families, {counts['rounds']} round, {counts['cut off']} are cut off, {counts['explained']} "
        f"are off with a note on what is known of the cause, and {counts['unexplained']} are off without one."
    )


def page(found: Mapping[str, Mapping[str, Sequence[Line]]], format: str) -> str:
    """The tables of papers, as text or Markdown."""
    from tokenmix.compiler.papers import OUTCOMES, tally, title_of

    markdown = format == "markdown"
    parts = []
    if len(found) > 1:
        parts += ["# Printed figures, reproduced", headline(found), _INTRODUCTION] if markdown else [headline(found)]
    for paper, tables in found.items():
        title = f"{paper}: {title_of(paper)}"
        counts = tally(_all(tables))
        words = ", ".join(f"{counts[outcome]} {word}" for outcome, word in OUTCOMES.items())
        parts.append(f"## {title}" if markdown else bold(title))
        parts.append(f"{sum(counts.values())} printed figures: {words}.")
        rebuilt = list(dict.fromkeys(line.spec for line in _all(tables) if line.is_reconstruction))
        if rebuilt:
            parts.append(f"Reconstructions: {', '.join(rebuilt)}.")
        parts += [_table(name, lines, format) for name, lines in tables.items()]
    return "\n\n".join(parts)


def _table(name: str, lines: Sequence[Line], format: str) -> str:
    markdown = format == "markdown"
    notes: dict[str, int] = {}
    inputs = [shape(line.shape) + (" dense" if line.dense else "") for line in lines]
    rules = [line.rule for line in lines]
    others = list(dict.fromkeys(key for line in lines for key in line.others))
    one_input, one_rule = len(set(inputs)) == 1, len(set(rules)) == 1
    head = ["row", "spec", *([] if one_input else ["input"])]
    texts = len(head)
    head += ["params", "computed [M]", "status"]
    head += ["FLOPs", f"computed [G, {rules[0]}]" if one_rule else "computed [G]"]
    head += [*([] if one_rule else ["rule"]), "status", *others]
    cells = []
    for line, input, rule in zip(lines, inputs, rules, strict=True):
        mark = f" [{notes.setdefault(line.note, len(notes) + 1)}]" if line.note else ""
        printed = {q: line.figures[q].printed if q in line.figures else "-" for q in ("params", "flops")}
        verdict = {q: line.figures[q].verdict if q in line.figures else "" for q in ("params", "flops")}
        cells.append(
            [line.row + mark, line.spec, *([] if one_input else [input])]
            + [printed["params"], mega(line.params), verdict["params"]]
            + [printed["flops"], giga(line.flops), *([] if one_rule else [rule]), verdict["flops"]]
            + [line.others.get(key, "-") for key in others]
        )
    title = f"{'Table' if name[:1].isdigit() else ''} {name or 'without a table'}".strip()
    caption = title + (f", input {inputs[0]}" if one_input else "")
    left = tuple(i for i, column in enumerate(head) if i < texts or column in ("status", "rule"))
    if not markdown:
        footnotes = [f"  [{mark}] {note}" for note, mark in notes.items()]
        return "\n".join([caption, table(head, cells, "table", left=left), *footnotes])
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    body = table(head, escaped, "markdown", left=left)
    footnotes = [f"- [{mark}] {note}" for note, mark in notes.items()]
    return "\n".join([f"### {caption}", "", body, *(["", *footnotes] if footnotes else [])])


def _json(found: Mapping[str, Mapping[str, Sequence[Line]]]) -> str:
    import json

    from tokenmix.compiler.papers import tally, title_of

    documents = [
        {
            "paper": paper,
            "title": title_of(paper),
            "figures": tally(_all(tables)),
            "tables": {name: [_record(line) for line in lines] for name, lines in tables.items()},
        }
        for paper, tables in found.items()
    ]
    return json.dumps({"schema": 1, "papers": documents}, indent=2)


def _record(line: Line) -> dict:
    return {
        "row": line.row,
        "spec": line.spec,
        "input": list(line.shape),
        "dense": line.dense,
        "reconstruction": line.is_reconstruction,
        "params": line.params,
        "flops": line.flops,
        "rule": line.rule,
        "published": [figure.as_dict() for figure in line.figures.values()],
        "printed": dict(line.others),
        "note": line.note,
    }


def _csv(found: Mapping[str, Mapping[str, Sequence[Line]]]) -> str:
    head = ["paper", "table", "row", "spec", "input", "dense", "printed params", "params", "params status"]
    head += ["printed FLOPs", "FLOPs", "rule", "FLOPs status", "other columns", "note"]
    rows = []
    for line in (line for tables in found.values() for line in _all(tables)):
        pairs = {
            q: (line.figures[q].printed, line.figures[q].status) if q in line.figures else ("", "")
            for q in ("params", "flops")
        }
        rows.append(
            [
                *(line.paper, line.table, line.row, line.spec, shape(line.shape), str(line.dense).lower()),
                *(pairs["params"][0], str(line.params), pairs["params"][1]),
                *(pairs["flops"][0], str(line.flops), line.rule, pairs["flops"][1]),
                *("; ".join(f"{key}={text}" for key, text in line.others.items()), line.note),
            ]
        )
    return table(head, rows, "csv")
