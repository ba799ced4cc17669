"""`tokenmix profile`: where a pass spends its time, block by block, beside the exact counts."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenmix.cli.specs import (
    add_keep_memory,
    add_set,
    add_specs,
    has_device,
    keeps_memory,
    parse_count,
    parse_sizes,
    tell,
)
from tokenmix.cli.tables import FORMATS, giga, table

_DOC = "example: tokenmix profile atmnet_t --batch 8 --tensorboard traces"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _DOC
    add_specs(parser, many=False)
    add_set(parser)
    parser.add_argument("--batch", metavar="N", type=parse_count, default=1, help="images per pass (default 1)")
    parser.add_argument("--size", metavar="SIZE", type=parse_sizes, help="input size, such as 224 or 256x320")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and images"
    )
    parser.add_argument("--rounds", type=parse_count, default=5, help="passes to average over (default 5)")
    parser.add_argument("--threads", type=parse_count, help="threads of torch (default: one per core)")
    parser.add_argument(
        "--tensorboard", metavar="DIR", type=Path, help="write a trace for TensorBoard's profiler plugin"
    )
    add_keep_memory(parser)
    parser.add_argument("--format", choices=FORMATS[:4], default="table", help="form of the report")


def run(options: argparse.Namespace) -> int:
    from tokenmix.compiler.model import load
    from tokenmix.runtime.module import require_torch

    require_torch()
    model = load(options.spec, **dict(options.set))
    if model.findings:
        tell(model.findings)
        return 1

    from tokenmix.runtime.bench import Setting, threads
    from tokenmix.runtime.profile import profile

    if not has_device(options.device) or (options.keep_memory and not keeps_memory()):
        return 2
    size = options.size[0] if options.size else model.input_shape[1:]
    setting = Setting(options.batch, size, options.device, options.dtype)
    with threads(options.threads):
        blocks = profile(model, setting, rounds=options.rounds, tensorboard=options.tensorboard)
    total, macs = sum(b.seconds for b in blocks), sum(b.macs for b in blocks)
    if options.format == "json":
        import json

        print(json.dumps({"schema": 1, "model": model.name, "blocks": [vars(b) for b in blocks]}, indent=2))
        return 0
    rows = [
        [
            b.name,
            b.block,
            f"{1e3 * b.seconds:.2f}",
            f"{b.seconds / total:.1%}" if total else "",
            giga(b.macs),
            f"{b.macs / macs:.1%}" if macs else "",
            f"{b.macs / b.seconds / 1e9:.1f}" if b.seconds else "",
        ]
        for b in blocks
    ]
    rows.append(["total", "", f"{1e3 * total:.2f}", "", giga(macs), "", f"{macs / total / 1e9:.1f}" if total else ""])
    head = ["place", "block", "time [ms]", "of time", "mac [G]", "of mac", "GMAC/s"]
    print(table(head, rows, options.format, left=(0, 1)))
    if options.tensorboard is not None and options.format == "table":
        print(f"\ntrace: {options.tensorboard}; look at it with: tensorboard --logdir {options.tensorboard}")
    return 0
