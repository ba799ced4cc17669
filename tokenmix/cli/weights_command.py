"""`tokenmix weights`: what a checkpoint holds, and checkpoints of others rewritten for a module of ours."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmix.cli.specs import add_set, tell
from tokenmix.cli.tables import mega, shape, table

if TYPE_CHECKING:
    from tokenmix.compiler.model import Model
    from tokenmix.runtime.checkpoints import Checkpoint
    from tokenmix.runtime.matching import Report

_DOC = """Read are safetensors, torch files and Paddle's .pdparams. No code in a file is run.

example: tokenmix weights inspect MixFormer_B4_pretrained.pdparams --spec mixformer_b4
         tokenmix weights convert mixformer_b4 MixFormer_B4_pretrained.pdparams -o mixformer_b4.safetensors"""
_FORMATS = ("table", "json", "csv", "markdown")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _DOC
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    raw = argparse.RawDescriptionHelpFormatter

    inspect = actions.add_parser("inspect", help="list the entries of a file", epilog=_DOC, formatter_class=raw)
    inspect.add_argument("file", metavar="FILE", type=Path, help="a checkpoint")
    inspect.add_argument("--spec", metavar="SPEC", help="also tell how the file fits the model of this spec")
    _common(inspect)
    inspect.add_argument("--format", choices=_FORMATS, default="table", help="form of the list")

    convert = actions.add_parser(
        "convert", help="write a file with the keys and shapes of a spec's module", epilog=_DOC, formatter_class=raw
    )
    convert.add_argument("spec", metavar="SPEC", help="path of a spec, or the name of a shipped one")
    convert.add_argument("file", metavar="IN", type=Path, help="a checkpoint")
    convert.add_argument(
        "-o", "--output", metavar="OUT", type=Path, required=True, help="the safetensors file to write"
    )
    _common(convert)
    convert.add_argument("--force", action="store_true", help="replace a file that tokenmix did not write")
    convert.add_argument("--format", choices=("text", "json"), default="text", help="form of the report")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layout", metavar="NAME", default="auto",
        help="tokenmix, official, a layout the spec names, or a layout file (default: the one that fits)",
    )  # fmt: skip
    parser.add_argument(
        "--allow", metavar="PATTERN", action="append", default=[],
        help="weights that may be missing and entries that may be left over, such as 'head.*'; may be repeated",
    )  # fmt: skip
    parser.add_argument("--entry", metavar="NAME", help="nested entry that holds the weights, such as model_ema")
    parser.add_argument("--dense", action="store_true", help="the dense backbone: the maps of all stages, no head")
    add_set(parser)


def _loaded(options: argparse.Namespace) -> Model | None:
    """The model of the spec, or None with the reason told."""
    from tokenmix.compiler.model import load

    model = load(options.spec, **dict(options.set))
    tell(model.findings)
    if model.plan is not None and options.dense and not model.plan.norms:
        print(f"error: {model.name} does not say under `features` what a dense backbone is", file=sys.stderr)
        return None
    return None if model.findings else model


def run(options: argparse.Namespace) -> int:
    from tokenmix.runtime.module import require_torch

    require_torch("numpy", "safetensors")
    return _inspect(options) if options.action == "inspect" else _convert(options)


def _convert(options: argparse.Namespace) -> int:
    from tokenmix.runtime.files import refusal
    from tokenmix.runtime.weights import convert_weights, was_converted

    model = _loaded(options)
    if model is None:
        return 1
    refused = refusal(options.output, lambda path: options.force or was_converted(path), "replace it with --force")
    if refused is not None:
        tell([refused])
        return 1
    report = convert_weights(
        model, options.file, options.output, options.layout,
        allow=options.allow, entry=options.entry, features_only=options.dense,
    )  # fmt: skip
    if options.format == "json":
        print(_json({"output": str(options.output), "report": report.as_dict()}))
    else:
        print(f"{report}\nwritten: {options.output}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from tokenmix.runtime.checkpoints import read_checkpoint
    from tokenmix.runtime.matching import is_finite
    from tokenmix.runtime.weights import no_tensors

    given = {
        "--layout": options.layout != "auto", "--allow": options.allow, "--dense": options.dense, "--set": options.set,
    }  # fmt: skip
    without = [name for name, value in given.items() if value]
    if options.spec is None and without:
        print(f"error: how the file fits is told with --spec SPEC; without it, {' and '.join(without)} says nothing",
              file=sys.stderr)  # fmt: skip
        return 2
    checkpoint = read_checkpoint(options.file)
    entry = options.entry if options.entry is not None or checkpoint.state(None)[0] else _usual(checkpoint)
    tensors, others = checkpoint.state(entry)
    report = problem = None
    if options.spec is not None:
        model = _loaded(options)
        if model is None:
            return 1
        report, problem = _fit(model, checkpoint, options)
        entry = report.entry if report is not None else entry
        tensors, others = checkpoint.state(entry)
    if not tensors:
        raise no_tensors(checkpoint)
    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    rows = [
        [name, shape(tensor.shape) or "scalar", str(tensor.dtype).removeprefix("torch.")]
        for name, tensor in tensors.items()
    ]
    rows += [[name, "", kind] for name, kind in others.items()]
    numbers = sum(tensor.numel() for tensor in tensors.values())
    head = ["entry", "shape", "dtype"]
    if options.format == "json":
        record = {
            "file": str(options.file), "kind": checkpoint.kind, "metadata": dict(checkpoint.metadata),
            "entry": entry, "entries": checkpoint.entries, "tensors": len(tensors), "numbers": numbers,
            "not_finite": broken, "rows": [dict(zip(head, row, strict=True)) for row in rows],
        }  # fmt: skip
        if options.spec is not None:
            record |= {"spec": options.spec, "fits": problem is None, "problem": problem}
            record["report"] = report.as_dict() if report is not None else None
        print(_json(record))
        return 1 if problem else 0
    if options.format == "table":  # the answer first: the list may be a thousand lines
        where = f", entry {entry}" if entry is not None else ""
        print(f"{options.file}{where}: {checkpoint.kind}, {len(tensors)} tensors, {mega(numbers)} M numbers")
        for name, count in checkpoint.entries.items():
            print(f"nested entry {name}: {count} tensors" + (" (shown)" if name == entry else ""))
        for name, text in sorted(checkpoint.metadata.items()):
            print(_plain(f"{name}: {text}"))
        if report is not None and problem is None:
            print(f"fits {options.spec}\n{report}")
        elif broken:
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            print(_plain(f"NaN or infinity in {', '.join(broken[:3])}{more}"))
    if problem is not None:
        sys.stdout.flush()
        print("error: " + "\n".join(map(_plain, problem.split("\n"))), file=sys.stderr, flush=True)
    print(table(head, [[_plain(cell) for cell in row] for row in rows], options.format, left=(0, 1, 2)))
    return 1 if problem else 0


def _usual(checkpoint: Checkpoint) -> str | None:
    """The nested entry to show of a file without tensors at its top: the averaged weights, or the first."""
    known = checkpoint.entries
    return next((name for name in ("model_ema", "model", "state_dict") if name in known), next(iter(known), None))


def _fit(model: Model, checkpoint: Checkpoint, options: argparse.Namespace) -> tuple[Report | None, str | None]:
    """How the checkpoint fits the module of a spec: the report where there is one, and what is wrong."""
    import torch

    from tokenmix.runtime.checkpoints import CheckpointError, WeightsError
    from tokenmix.runtime.module import build
    from tokenmix.runtime.weights import Mismatch, matched

    with torch.device("meta"):
        wanted = build(model, features_only=options.dense).state_dict()
    try:
        _, report = matched(wanted, checkpoint, options.layout, model, options.allow, options.entry)
        return report, None
    except Mismatch as mismatch:
        return mismatch.report, str(mismatch)
    except CheckpointError:
        raise  # there is nothing to list either
    except WeightsError as error:
        return None, str(error)


def _json(record: dict[str, Any]) -> str:
    import json

    return json.dumps({"schema": 1, **record}, indent=2)


def _plain(text: str) -> str:
    """A name from a file as it may stand on a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:1000])
