"""`tokenmix bench`: how fast a spec's module runs, beside its reference, other models, and the machine's limit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmix.cli.specs import add_set, add_specs, has_device, load_all, parse_count, parse_counts, parse_sizes, tell
from tokenmix.cli.tables import FORMATS, shape, table

if TYPE_CHECKING:
    from tokenmix.runtime.bench import Setting, Timing

_DOC = """Modules run in turns in one process after two rounds of warm-up; times are medians, with the fastest and the
slowest pass. Multiply-adds are counted exactly (convention mac); in training a step counts three forward passes.

example: tokenmix bench mixformer_b4 --batch 1,8 --against reference --against timm:swin_tiny_patch4_window7_224"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _DOC
    add_specs(parser)
    add_set(parser)
    parser.add_argument("--batch", metavar="N[,N]", type=parse_counts, default=[1], help="images per pass (default 1)")
    parser.add_argument("--size", metavar="SIZE[,SIZE]", type=parse_sizes, help="input sizes, such as 224,256x320")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        default="float32",
        help="of weights and images",
    )
    parser.add_argument("--mode", choices=("eager", "compile"), default="eager", help="compile: with torch.compile")
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument("--train", action="store_true", help="forward and backward instead of evaluation")
    passes.add_argument("--for-inference", action="store_true", help="fold the specs' own modules first")
    parser.add_argument(
        "--against", metavar="WHAT", action="append", default=[],
        help="reference (plain torch layers), timm:NAME or FILE.py:CLASS; may be repeated",
    )  # fmt: skip
    parser.add_argument("--rounds", type=parse_count, default=10, help="timed passes of each (default 10)")
    parser.add_argument("--threads", type=parse_count, help="threads of torch (default: one per core)")
    parser.add_argument(
        "--tf32", action="store_true", help="on CUDA let float32 use TF32, in convolutions and matrix products alike"
    )
    parser.add_argument("--format", choices=FORMATS[:4], default="table", help="form of the report")


def run(options: argparse.Namespace) -> int:
    from tokenmix.runtime.module import require_torch

    require_torch()
    models = load_all(options.specs, options.set)
    findings = [f for model in models for f in model.findings]
    if findings:
        tell(findings)
        return 1

    from tokenmix.runtime.bench import Setting, bench, copy_bandwidth, gemm_rate, tensor_float32, threads

    if not has_device(options.device):
        return 2
    rows: list[tuple[Setting, Timing, Timing, float]] = []
    with threads(options.threads), tensor_float32(options.tf32):
        for model in models:
            for size in options.size or [model.input_shape[1:]]:
                for batch in options.batch:
                    setting = Setting(
                        batch,
                        size,
                        options.device,
                        options.dtype,
                        options.mode == "compile",
                        options.train,
                        options.for_inference,
                    )
                    try:
                        timings = bench(model, setting, options.against, rounds=options.rounds, progress=_progress)
                    except ValueError as error:
                        _progress("")
                        print(f"error: {error}", file=sys.stderr)
                        return 2
                    _progress("measuring a matrix product")
                    limit = gemm_rate(options.device, options.dtype)
                    rows += [(setting, timing, timings[0], limit) for timing in timings]
        _progress("")
        bandwidth = copy_bandwidth(options.device) if options.device.startswith("cuda") else 0.0
        facts = _facts(options, bandwidth)
    _print(rows, facts, options)
    return 0


def _progress(what: str) -> None:
    """One line on a terminal, overwritten; nothing in a pipe."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def _facts(options: argparse.Namespace, bandwidth: float) -> dict[str, str]:
    import torch

    cuda = options.device.startswith("cuda")
    facts = {
        "machine": torch.cuda.get_device_name() if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "pass": f"{_pass(options)}, {options.dtype}, {options.mode}",
    }
    if cuda and options.dtype == "float32":
        facts["tf32"] = f"{'on' if options.tf32 else 'off'} in convolutions and matrix products"
    return facts | ({"copy": f"{bandwidth / 1e9:.0f} GB/s"} if bandwidth else {})


def _pass(options: argparse.Namespace) -> str:
    if options.train:
        return "training step"
    return "evaluation, folded for inference" if options.for_inference else "evaluation"


def _processor() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


_HEAD = [
    "model",
    "input",
    "median [ms]",
    "min [ms]",
    "max [ms]",
    "images/s",
    "peak [MiB]",
    "GMAC/s",
    "of GEMM",
    "time / first",
]


def _print(
    rows: list[tuple[Setting, Timing, Timing, float]], facts: dict[str, str], options: argparse.Namespace
) -> None:
    if options.format == "json":
        import json

        print(json.dumps({"schema": 1, **facts, "rows": [_record(*row) for row in rows]}, indent=2))
        return
    cells = [_cells(*row) for row in rows]
    if options.format in ("table", "markdown"):
        print("; ".join(f"{key}: {value}" for key, value in facts.items()))
        print("`time / first`: this median over that of the first model; 2.00 takes twice as long.\n")
    print(table(_HEAD, cells, options.format, left=(0, 1)))


def _record(setting: Setting, timing: Timing, first: Timing, limit: float) -> dict[str, Any]:
    record: dict[str, Any] = {
        "model": timing.name,
        "batch": setting.batch,
        "size": list(setting.size),
        "median_ms": 1e3 * timing.median,
        "times_ms": [1e3 * s for s in timing.seconds],
        "images_per_second": setting.batch / timing.median,
        "peak_bytes": timing.peak,
        "gemm_macs_per_second": limit,
        "time_relative_to_first": timing.median / first.median,
    }
    if timing.macs:
        record |= {"macs": timing.macs, "macs_per_second": timing.rate(setting.train)}
    return record


def _cells(setting: Setting, timing: Timing, first: Timing, limit: float) -> list[str]:
    rate = timing.rate(setting.train)
    return [
        timing.name,
        f"{setting.batch}x{shape(setting.size)}",
        *(f"{1e3 * s:.1f}" for s in (timing.median, min(timing.seconds), max(timing.seconds))),
        f"{setting.batch / timing.median:.1f}",
        f"{timing.peak / 2**20:.1f}",
        f"{rate / 1e9:.1f}" if rate else "",
        f"{rate / limit:.0%}" if rate else "",
        "" if timing is first else f"{timing.median / first.median:.2f}",
    ]
