"""`tokenmix bench`: how fast a spec's module runs, beside its reference, other models, and the machine's limit."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmix.cli.specs import (
    add_keep_memory,
    add_set,
    has_device,
    keeps_memory,
    load_all,
    parse_count,
    parse_counts,
    parse_sizes,
    tell,
)
from tokenmix.cli.tables import FORMATS, shape, table

if TYPE_CHECKING:
    from tokenmix.compiler.model import Model
    from tokenmix.runtime.bench import Setting, Timing
    from tokenmix.runtime.kernel_bench import KernelTiming

_DOC = """Modules run in turns in one process after two rounds of warm-up; times are medians, with the fastest and the
slowest pass. Multiply-adds are counted exactly (convention mac); in training a step counts three forward passes.

With --kernels each fast kernel runs alone, in turns with the reference that it replaces and with a copy. Bytes are
counted exactly: inputs read once, outputs written once; with --train the backward pass reads inputs and gradients once
more and writes gradients. The copy moves as many.

examples: tokenmix bench mixformer_b4 --batch 1,8 --against reference --against timm:swin_tiny_patch4_window7_224
          tokenmix bench mixformer_b4 --against 'released.py:MixFormer(embed_dim=64, depths=[2, 2, 8, 8])'
          tokenmix bench mixformer_b4 --batch 8 --train --checkpoint
          tokenmix bench --kernels axial_sample --train"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _DOC
    parser.add_argument("specs", metavar="SPEC", nargs="*", help="path of a spec, or the name of a shipped one")
    parser.add_argument(
        "--kernels", metavar="NAME", nargs="*", help="instead of specs: fast kernels alone (default: all of them)"
    )
    add_set(parser)
    parser.add_argument(
        "--batch", metavar="N[,N]", type=parse_counts,
        help="images per pass (default 1; of kernels 4, on cuda 128)",
    )  # fmt: skip
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
        help="reference (plain torch layers), timm:NAME, FILE.py:CLASS or 'FILE.py:CLASS(width=64)'; may be repeated",
    )  # fmt: skip
    parser.add_argument("--checkpoint", action="store_true", help="with --train: activation checkpointing beside plain")
    parser.add_argument("--rounds", type=parse_count, help="timed passes of each (default 10; of kernels 30)")
    parser.add_argument("--threads", type=parse_count, help="threads of torch (default: one per core)")
    parser.add_argument(
        "--tf32", action="store_true", help="on CUDA let float32 use TF32, in convolutions and matrix products alike"
    )
    add_keep_memory(parser)
    parser.add_argument("--format", choices=FORMATS[:4], default="table", help="form of the report")


def run(options: argparse.Namespace) -> int:
    from tokenmix.runtime.module import require_torch

    require_torch()
    wrong = _misuse(options)
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    models = load_all(options.specs, options.set)
    findings = [f for model in models for f in model.findings]
    if findings:
        tell(findings)
        return 1

    from tokenmix.runtime.bench import tensor_float32, threads

    if not has_device(options.device) or (options.keep_memory and not keeps_memory()):
        return 2
    with threads(options.threads), tensor_float32(options.tf32):
        try:
            facts = _facts(options)
            if options.kernels is not None:
                _print_kernels(_bench_kernels(options), facts, options)
            else:
                _print(_bench_models(models, options), facts, options)
        except ValueError as error:
            _progress("")
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def _misuse(options: argparse.Namespace) -> str:
    """What is wrong with the choice of options, or nothing."""
    if options.checkpoint and not options.train:
        return "--checkpoint saves memory of training: give --train with it"
    if options.kernels is None:
        return "" if options.specs else "give specs, or --kernels"
    used = {
        "specs": options.specs,
        "--set": options.set,
        "--size": options.size,
        "--against": options.against,
        "--for-inference": options.for_inference,
        "--checkpoint": options.checkpoint,
    }
    given = [name for name, value in used.items() if value]
    return f"--kernels runs kernels alone, at shapes of their own: no {given[0]} with it" if given else ""


def _setting(options: argparse.Namespace, batch: int, size: tuple[int, int]) -> Setting:
    from tokenmix.runtime.bench import Setting

    compiled = options.mode == "compile"
    return Setting(
        batch,
        size,
        options.device,
        options.dtype,
        compiled,
        options.train,
        options.for_inference,
        options.checkpoint,
    )


def _bench_models(models: list[Model], options: argparse.Namespace) -> list[tuple[Setting, Timing, Timing, float]]:
    """For every contestant: the setting, its timing, the first contestant's, and the rate of a matrix product."""
    from tokenmix.runtime.bench import bench, gemm_rate

    rows = []
    for model in models:
        for size in options.size or [model.input_shape[1:]]:
            for batch in options.batch or [1]:
                setting = _setting(options, batch, size)
                timings = bench(model, setting, options.against, rounds=options.rounds or 10, progress=_progress)
                _progress("measuring a matrix product")
                limit = gemm_rate(options.device, options.dtype)
                rows += [(setting, timing, timings[0], limit) for timing in timings]
    _progress("")
    return rows


def _bench_kernels(options: argparse.Namespace) -> list[KernelTiming]:
    from tokenmix.runtime.kernel_bench import bench_kernels

    rows: list[KernelTiming] = []
    for batch in options.batch or [128 if options.device.startswith("cuda") else 4]:
        setting = _setting(options, batch, (0, 0))
        rows += bench_kernels(options.kernels, setting, rounds=options.rounds or 30, progress=_progress)
    _progress("")
    return rows


def _progress(what: str) -> None:
    """One line on a terminal, overwritten; nothing in a pipe."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def _facts(options: argparse.Namespace) -> dict[str, str]:
    import torch

    from tokenmix.runtime.bench import copy_bandwidth
    from tokenmix.runtime.memory import allocator

    cuda = options.device.startswith("cuda")
    facts = {
        "machine": torch.cuda.get_device_name() if cuda else f"{_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "pass": f"{_pass(options)}, {options.dtype}, {options.mode}",
    }
    if cuda and options.dtype == "float32":
        facts["tf32"] = f"{'on' if options.tf32 else 'off'} in convolutions and matrix products"
    if cuda:
        facts["copy"] = f"{copy_bandwidth(options.device) / 1e9:.0f} GB/s"
    else:
        facts["allocator"] = allocator()[0]
    return facts


def _pass(options: argparse.Namespace) -> str:
    if options.kernels is not None:
        return "forward, and forward and backward" if options.train else "forward"
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
    "faults",
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
        print("`time / first`: this median over that of the first model; 2.00 takes twice as long.")
        print("`faults`: pages that the system supplied during a pass; see `tokenmix doctor` on the allocator.\n")
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
        "page_faults": timing.faults,
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
        str(timing.faults),
        f"{rate / 1e9:.1f}" if rate else "",
        f"{rate / limit:.0%}" if rate else "",
        "" if timing is first else f"{timing.median / first.median:.2f}",
    ]


_KERNEL_HEAD = [
    "kernel",
    "case",
    "pass",
    "runs as",
    "median [ms]",
    "min [ms]",
    "max [ms]",
    "reference [ms]",
    "min [ms]",
    "max [ms]",
    "reference / kernel",
    "MB",
    "GB/s",
    "of copy",
]


def _print_kernels(rows: list[KernelTiming], facts: dict[str, str], options: argparse.Namespace) -> None:
    if options.format == "json":
        import json

        print(json.dumps({"schema": 1, **facts, "rows": [_kernel_record(row) for row in rows]}, indent=2))
        return
    if options.format in ("table", "markdown"):
        print("; ".join(f"{key}: {value}" for key, value in facts.items()))
        print("`reference / kernel`: round by round; 2.00 is twice as fast. `of copy`: of a copy of as many bytes.\n")
    print(table(_KERNEL_HEAD, [_kernel_cells(row) for row in rows], options.format, left=range(4)))


def _kernel_record(row: KernelTiming) -> dict[str, Any]:
    return {
        "kernel": row.kernel,
        "case": row.case,
        "pass": row.step,
        "runs": row.runs,
        **{f"{side}_ms": [1e3 * s for s in getattr(row, side)] for side in ("fast", "reference", "copy")},
        "reference_relative_to_kernel": row.ratio,
        "bytes": row.moved,
        "bytes_per_second": row.bandwidth,
        "share_of_copy": row.share,
    }


def _kernel_cells(row: KernelTiming) -> list[str]:
    from statistics import median

    times = [f"{1e3 * f(side):.3f}" for side in (row.fast, row.reference) for f in (median, min, max)]
    numbers = [f"{row.ratio:.2f}", f"{row.moved / 1e6:.2f}", f"{row.bandwidth / 1e9:.1f}", f"{row.share:.0%}"]
    return [row.kernel, row.case, row.step, row.runs, *times, *numbers]
