"""`tokenmix flops`: exact counts, torch-free; with `--audit` compared with fvcore's count of the emitted module."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tokenmix.cli.specs import add_set, add_specs, load_all, parse_sizes, tell
from tokenmix.cli.tables import FORMATS, giga, mega, megabytes, shape, table

if TYPE_CHECKING:
    from tokenmix.compiler.model import Model

_DOC = """conventions: mac (multiply-adds of convolutions, linear layers and attention), flops (two per multiply-add),
fvcore and mmcv (what those counters count), and the paper's own where a spec declares one.
Of several specs, families (whose parameters have no values yet) are passed over.

example: tokenmix flops specs/mixformer_b4.yaml --size 224,800x1280 --by stage"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _DOC
    add_specs(parser)
    add_set(parser)
    parser.add_argument(
        "--size", metavar="SIZES", type=parse_sizes,
        help="input sizes, 224 or HEIGHTxWIDTH, separated by commas (default: those of the printed figures)",
    )  # fmt: skip
    parser.add_argument(
        "--by", choices=("model", "stage", "block", "op"), default="model", help="how fine to break down"
    )
    parser.add_argument("--convention", metavar="NAMES", help="conventions to show, separated by commas (default: mac)")
    parser.add_argument(
        "--dense", action="store_true", help="count the dense backbone: the maps of all stages, no head"
    )
    parser.add_argument("--format", choices=FORMATS, default="table", help="form of the report")
    parser.add_argument(
        "--audit", action="store_true",
        help="build each module and compare fvcore's count with the analytic one, by layer (needs torch and fvcore); "
        "default sizes 224 and 256x320",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    models = [m for m in load_all(options.specs, options.set) if not _skipped(m, options)]
    findings = [f for m in models for f in m.findings]
    if findings:
        tell(findings, "github" if options.format == "github" else "text")
        return 1
    if not models:
        print("nothing to count: every spec is a family to be extended", file=sys.stderr)
        return 1
    if options.audit:
        return _audit(models, options)
    from tokenmix.compiler.report import exact_misses

    for model in models:
        for name in _names(options):
            if name not in model.conventions:
                known = ", ".join(model.conventions)
                print(f"error: {model.name} has no convention `{name}`; it has {known}", file=sys.stderr)
                return 2
    print(_report(models, options))
    misses = [f for m in models for f in exact_misses(m)] if not options.set else []
    tell(misses, "github" if options.format == "github" else "text")
    return 1 if misses else 0


def _skipped(model: Model, options: argparse.Namespace) -> bool:
    return model.is_family and len(options.specs) > 1


def _names(options: argparse.Namespace) -> list[str]:
    return options.convention.split(",") if options.convention else []


def _sizes(model: Model, options: argparse.Namespace) -> list[tuple[int, int]]:
    from tokenmix.compiler.report import report_sizes

    return options.size or report_sizes(model)


def _report(models: list[Model], options: argparse.Namespace) -> str:
    if options.by != "model":
        return _breakdown(models, options)
    if options.format == "json":
        return _json(models, options)
    if options.format == "github":
        return _github(models, options)
    shown = _names(options) or ["mac"]
    exact = options.format == "csv"
    head = [
        "spec",
        "input",
        "params" if exact else "params [M]",
        *[n if exact else f"{n} [G]" for n in shown],
        "printed params",
        "printed FLOPs",
    ]
    rows: list[list[str]] = []
    notes: dict[str, int] = {}
    for model, cost, figures in _lines(models, options):
        cells = {
            q: "; ".join(dict.fromkeys(_cell(f, notes) for f in figures if f.quantity == q))
            for q in ("params", "flops")
        }
        numbers = (
            [str(cost.params), *(str(cost[n]) for n in shown)]
            if exact
            else [mega(cost.params), *(giga(cost[n]) for n in shown)]
        )
        rows.append([model.name, shape(cost.input), *numbers, cells["params"], cells["flops"]])
    text = table(head, rows, options.format, left=(0, 1, len(head) - 2, len(head) - 1))
    if options.format != "table":
        return text
    caption = (
        f"One image; {', '.join(shown)}: multiply-adds and such in 10^9 under that convention; parameters in 10^6."
    )
    kind = " Dense backbone." if options.dense else ""
    footnotes = [f"  [{mark}] {note}" for note, mark in notes.items()]
    rebuilt = [m.name for m in models if m.spec is not None and m.spec.status.is_reconstruction]
    if rebuilt:
        footnotes.append(
            f"Reconstructions: {', '.join(rebuilt)}; `tokenmix show` tells what is stated and what is not."
        )
    return "\n".join([caption + kind, text, *footnotes])


def _lines(models: list[Model], options: argparse.Namespace):
    from tokenmix.compiler.report import figures

    for model in models:
        for size in _sizes(model, options):
            cost = model.cost(size, dense=options.dense)
            yield model, cost, figures(model, cost.input, dense=options.dense)


def _cell(figure, notes: dict[str, int]) -> str:
    rule = f" {figure.rule}" if figure.quantity == "flops" and figure.rule != "mac" else ""
    text = f"{figure.printed}{rule} {figure.verdict}"
    if figure.note:
        text += f" [{notes.setdefault(figure.note, len(notes) + 1)}]"
    return text


def _json(models: list[Model], options: argparse.Namespace) -> str:
    import json

    rows = [
        {
            "spec": model.spec.source.name if model.spec else model.name,
            "name": model.name,
            "input": list(cost.input),
            "dense": options.dense,
            "status": model.spec.status.as_json() if model.spec else "",
            "reconstruction": model.spec is not None and model.spec.status.is_reconstruction,
            "params": cost.params,
            "costs": cost.as_dict(),
            "tally": dict(cost.tally),
            "published": [f.as_dict() for f in figures],
        }
        for model, cost, figures in _lines(models, options)
    ]
    return json.dumps({"schema": 1, "rows": rows}, indent=2)


def _github(models: list[Model], options: argparse.Namespace) -> str:
    lines = []
    for model, cost, figures in _lines(models, options):
        name = model.spec.source.name if model.spec else model.name
        lines.append(
            f"::notice file={name},title={model.name} {shape(cost.input)}::{mega(cost.params)} M parameters, "
            f"{giga(cost['mac'])} G multiply-adds"
        )
        for figure in figures:
            if figure.status == "off":
                lines.append(
                    f"::warning file={name},title={model.name} {figure.quantity}::printed {figure.printed}, "
                    f"computed {figure.value} ({figure.gap:+.1%}, {figure.rule}). {figure.note}"
                )
    return "\n".join(lines)


def _breakdown(models: list[Model], options: argparse.Namespace) -> str:
    from tokenmix.compiler.report import rows_by

    shown = _names(options) or ["mac"]
    parts, records = [], []
    for model in models:
        for size in _sizes(model, options):
            graph = model.elaborate(size, dense=options.dense)
            rows = rows_by(options.by, graph, [model.conventions[n] for n in shown])
            if options.format in ("json", "csv"):
                records += [_record(model, graph.inputs[0].dims, row, options.by) for row in rows]
                continue
            parts.append(_stage_text(model, graph, rows, shown, options))
    if options.format == "json":
        import json

        return json.dumps({"schema": 1, "by": options.by, "rows": records}, indent=2)
    if options.format == "csv":
        head = [
            "spec",
            "input",
            options.by,
            "blocks",
            "depth",
            "output",
            "params",
            *shown,
            "activation_bytes",
            "peak_live_bytes",
        ]
        rows_text = [
            [
                r["spec"],
                shape(r["input"]),
                r["name"],
                r["block"],
                str(r["depth"]),
                shape(r["output"] or []),
                str(r["params"]),
            ]
            + [str(r["costs"][n]) for n in shown]
            + [str(r["activation_bytes"]), str(r.get("peak_live_bytes", ""))]
            for r in records
        ]
        return table(head, rows_text, "csv")
    return "\n\n".join(parts)


def _record(model: Model, dims, row, by: str) -> dict:
    record = {
        "spec": model.name,
        "input": list(dims),
        "name": row.name,
        "block": row.block,
        "depth": row.depth,
        "output": list(row.output.dims) if row.output else None,
        "params": row.params,
        "costs": row.costs,
        "activation_bytes": row.activation_bytes,
    }
    return record | ({"peak_live_bytes": row.peak_bytes} if by == "stage" else {})


def _stage_text(model: Model, graph, rows, shown: list[str], options: argparse.Namespace) -> str:
    by_stage = options.by == "stage"
    head = [options.by, "block", "depth", "output", "params [M]", *[f"{n} [G]" for n in shown], "activations [MiB]"]
    if by_stage:
        head.append("peak live [MiB]")
    if options.by == "op":
        head[1:4] = ["uses"]
    lines = []
    for row in rows:
        middle = [str(row.depth)] if options.by == "op" else [row.block, str(row.depth), shape(row.output.dims)]
        numbers = [mega(row.params), *(giga(row.costs[n]) for n in shown), megabytes(row.activation_bytes)]
        lines.append([row.name, *middle, *numbers, *([megabytes(row.peak_bytes)] if by_stage else [])])
    blank = [""] if options.by == "op" else ["", "", ""]
    totals = [mega(graph.num_params), *(giga(sum(r.costs[n] for r in rows)) for n in shown)]
    peak = [megabytes(max(r.peak_bytes for r in rows))] if by_stage else []
    lines.append(["total", *blank, *totals, megabytes(sum(r.activation_bytes for r in rows)), *peak])
    caption = f"{model.name}, input {shape(graph.inputs[0].dims)}, one image, float32" + (
        ", dense backbone" if options.dense else ""
    )
    text = table(head, lines, options.format, left=(0,) if options.by == "op" else (0, 1, 3))
    return f"{caption}\n{text}" if options.format == "table" else f"{caption}\n\n{text}"


def _audit(models: list[Model], options: argparse.Namespace) -> int:
    from tokenmix.runtime.audit import audit
    from tokenmix.runtime.module import require_torch

    require_torch("fvcore")
    sizes = options.size or [(224, 224), (256, 320)]
    findings, lines = [], []
    for number, model in enumerate(models, 1):
        for size in sizes:
            if sys.stderr.isatty():
                print(
                    f"\r\033[K[{number}/{len(models)}] {model.name} {shape(size)}", end="", file=sys.stderr, flush=True
                )
            model.elaborate(size, dense=options.dense)  # a size it does not take is a finding
            result = audit(model, size, dense=options.dense)
            findings += result.findings
            lines.append(
                [
                    model.name,
                    shape(size),
                    str(result.analytic),
                    str(result.measured),
                    str(result.entries),
                    "equal" if not result.findings else "DIFFERS",
                ]
            )
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if options.format == "json":
        import json

        keys = ("name", "size", "analytic", "fvcore", "entries", "status")
        print(json.dumps({"schema": 1, "audit": [dict(zip(keys, row, strict=True)) for row in lines]}, indent=2))
    else:
        head = ["spec", "input", "analytic", "fvcore", "layers compared", "status"]
        print(table(head, lines, options.format, left=(0, 1, 5)))
    from tokenmix.compiler.report import exact_misses

    findings += [f for m in models for f in exact_misses(m)] if not options.set else []
    tell(findings, "github" if options.format == "github" else "text")
    return 1 if findings else 0
