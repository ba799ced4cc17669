"""`tokenmix build`: spec to source to module to one forward pass, with the budget beside the paper's figures."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tokenmix.cli.specs import add_set, add_specs, parse_sizes, tell
from tokenmix.cli.tables import giga, mega, megabytes, shape, table

if TYPE_CHECKING:
    from tokenmix.compiler.model import Model

_DOC = """The source goes to ./NAME.py unless -o says otherwise. A file that tokenmix did not write is never replaced.

example: tokenmix build specs/mixformer_b4.yaml --set drop_path=0.1 -o my_model.py"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _DOC
    add_specs(parser, many=False)
    add_set(parser)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="where the source goes (default ./NAME.py)")
    parser.add_argument("--standalone", action="store_true", help="write a source that needs nothing but torch")
    parser.add_argument(
        "--for-inference",
        action="store_true",
        help="norms folded into their neighbours, activations fused; weights are folded by for_inference",
    )
    parser.add_argument(
        "--size", metavar="SIZE", type=_one_size, help="with --for-inference: of all images, such as 224 or 256x320"
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        type=Path,
        help="picture to run through the module (default: a photograph that comes with tokenmix)",
    )


def _one_size(text: str) -> tuple[int, int]:
    sizes = parse_sizes(text)
    if len(sizes) != 1:
        raise argparse.ArgumentTypeError(f"a source is made for one size, got {text!r}")
    return sizes[0]


def run(options: argparse.Namespace) -> int:
    from tokenmix.compiler.model import load
    from tokenmix.compiler.report import exact_misses
    from tokenmix.runtime.files import refusal, write_whole
    from tokenmix.runtime.module import require_torch

    require_torch("numpy", "PIL")
    model = load(options.spec, **dict(options.set))
    if model.findings:
        tell(model.findings)
        return 1
    output = options.output or Path(f"{model.name}.py")
    refused = refusal(output, _was_emitted, "move it away")
    if refused is not None:
        tell([refused])
        return 1
    if options.image is not None and not options.image.is_file():
        print(f"error: there is no picture {options.image}", file=sys.stderr)
        return 2
    if options.size is not None and not options.for_inference:
        print("error: --size is for sources made with --for-inference; others take images of any size", file=sys.stderr)
        return 2
    printed = model
    if options.for_inference:
        from tokenmix.compiler.passes import inference_model
        from tokenmix.dsl.diagnostics import FindingsError

        try:
            printed = inference_model(model, size=options.size).model
        except FindingsError as error:
            tell(list(error.findings))
            return 1
    source = printed.source(standalone=options.standalone)
    write_whole(output, source)
    print(_stages(model))
    assert model.spec is not None
    for line in model.spec.status.lines():
        print(line)
    print(_figures(model))
    print(f"\nsource: {output} ({len(source.splitlines())} lines{', needs torch only' if options.standalone else ''})")
    misses = exact_misses(model) if not options.set else []
    tell(misses)
    status = _run(printed, source, options)
    return 1 if misses else status


def _was_emitted(path: Path) -> bool:
    """Whether a file is a source that tokenmix wrote."""
    from tokenmix.compiler.emit.program import MARK

    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().startswith(MARK)
    except (OSError, UnicodeDecodeError):
        return False


def _stages(model: Model) -> str:
    from tokenmix.compiler.report import rows_by

    graph = model.elaborate()
    rows = rows_by("stage", graph, [model.conventions["mac"]])
    head = ["stage", "block", "dim", "depth", "map", "params [M]", "MACs [G]", "peak live [MiB]"]
    lines = []
    for row in rows:
        output = row.output
        assert output is not None
        dim = str(getattr(output, "C", ""))
        size = f"{output.H}x{output.W}" if output.kind == "map" else ""
        lines.append(
            [
                row.name,
                row.block,
                dim,
                str(row.depth),
                size,
                mega(row.params),
                giga(row.costs["mac"]),
                megabytes(row.peak_bytes),
            ]
        )
    total = sum(r.costs["mac"] for r in rows)
    lines.append(
        ["total", "", "", "", "", mega(graph.num_params), giga(total), megabytes(max(r.peak_bytes for r in rows))]
    )
    return f"{model.name}, input {shape(graph.inputs[0].dims)}\n" + table(head, lines, "table", left=(0, 1))


def _figures(model: Model) -> str:
    from tokenmix.compiler.report import figures, report_sizes

    found: dict[tuple[str, str, str], list[str]] = {}  # figures that several tables print stand in one line
    for size in report_sizes(model):
        dims = (model.input_shape[0], *size)
        for figure in figures(model, dims):
            value = mega(figure.value) + " M" if figure.quantity == "params" else giga(figure.value) + " G"
            verdict = figure.verdict + (f": {figure.note or 'no reason known'}" if figure.status == "off" else "")
            rule = "" if figure.quantity == "params" else f" ({figure.rule})"
            key = (f"  {figure.quantity + rule:16} {value:>10}   printed {figure.printed}", shape(dims), verdict)
            found.setdefault(key, []).append(figure.table)
    lines = [f"{head} in {_tables(names)} at {dims}: {verdict}" for (head, dims, verdict), names in found.items()]
    if model.overrides:
        return "with settings of its own: not held against the paper"
    if not lines:
        return "no printed figures to compare with"
    return "against the paper:\n" + "\n".join(lines)


def _tables(names: list[str]) -> str:
    """`table 3.1`, `tables 3.1, 3.2`, `README and table 4`: sources of a figure in words."""
    names = list(dict.fromkeys(names))
    numbers = [n for n in names if n[:1].isdigit()]
    others = [n for n in names if not n[:1].isdigit()]
    head = "table " if len(numbers) == 1 else "tables "
    parts = [head + ", ".join(numbers)] if numbers else []
    return " and ".join([*others, *parts])


def _run(model: Model, source: str, options: argparse.Namespace) -> int:
    note = _Progress()
    note("importing torch")
    import torch

    from tokenmix.runtime.image import PictureError, load_picture
    from tokenmix.runtime.module import class_name, import_source

    try:
        images, picture = load_picture(
            options.image, (model.input_shape[0], *(model.fixed_size or model.input_shape[1:]))
        )
    except PictureError as error:
        note.clear()
        print(f"error: {error}", file=sys.stderr)
        return 2
    note("building the module")
    start = time.perf_counter()
    module = getattr(import_source(source, model.name), class_name(model))().eval()
    built = time.perf_counter() - start
    note("running one image")
    start = time.perf_counter()
    with torch.inference_mode():
        result = module(images)
    ran = time.perf_counter() - start
    note.clear()
    finite = bool(torch.isfinite(result).all())
    print(
        f"ran {picture} as {shape(tuple(images.shape))}: result {shape(tuple(result.shape))}, "
        f"{'all finite' if finite else 'NOT FINITE'}, weights fresh (built in {built:.2f} s, one pass {ran:.2f} s)"
    )
    return 0 if finite else 1


class _Progress:
    """One line on a terminal that says what is being waited for; a pipe sees nothing."""

    def __call__(self, what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{what} ...", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
