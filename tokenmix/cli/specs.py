"""What commands that take specs have in common: settings, sizes, and telling what is wrong."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenmix.compiler.model import Model
    from tokenmix.dsl.diagnostics import Finding

__all__ = [
    "add_keep_memory", "add_set", "add_specs", "has_device", "keeps_memory", "load_all", "parse_count", "parse_counts",
    "parse_sizes", "tell",
]  # fmt: skip


def add_specs(parser: argparse.ArgumentParser, many: bool = True) -> None:
    help = "path of a spec, or the name of a shipped one"
    if many:
        parser.add_argument("specs", metavar="SPEC", nargs="+", help=help)
    else:
        parser.add_argument("spec", metavar="SPEC", help=help)


def add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], type=_setting,
        help="give a parameter of the spec another value; may be repeated",
    )  # fmt: skip


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip().isidentifier() or not value.strip() or "\n" in text:
        raise argparse.ArgumentTypeError(f"write KEY=VALUE, such as --set heads=[2,4,8,16], not {text!r}")
    return key.strip(), value.strip()


def parse_count(text: str) -> int:
    """A number of rounds, threads or images."""
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1, not {text[:40]!r}")
    return int(text)


def parse_counts(text: str) -> list[int]:
    """Numbers of a `--batch` option: `1,8`."""
    return [parse_count(part) for part in text.split(",")]


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Sizes of a `--size` option: `224,256x320`."""
    from tokenmix.compiler.model import parse_size

    try:
        return [parse_size(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_keep_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-memory", action="store_true",
        help="let this process keep freed memory (glibc only), so that no pass maps its activations anew",
    )  # fmt: skip


def keeps_memory() -> bool:
    """Tell the allocator to keep what is freed; if that cannot be had, standard error says why."""
    from tokenmix.runtime.memory import allocator, keep_memory

    if keep_memory():
        return True
    print(f"error: --keep-memory needs glibc's allocator; here it is {allocator()[0]}", file=sys.stderr)
    return False


def has_device(name: str) -> bool:
    """Whether torch can run on a device; if not, standard error says why."""
    import torch

    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:
        known = "cpu" + (", cuda" if torch.cuda.is_available() else "; torch finds no CUDA device here")
        why = "no device" if "Expected one of" in str(error) else "no device that torch can use"
        print(f"error: {name} is {why}: {known}", file=sys.stderr)
        return False
    return True


def load_all(names: list[str], settings: list[tuple[str, str]]) -> list[Model]:
    from tokenmix.compiler.model import load

    return [load(name, **dict(settings)) for name in names]


def tell(findings: list[Finding] | tuple[Finding, ...], format: str = "text") -> None:
    """Findings to standard error, with their number."""
    from tokenmix.dsl.diagnostics import render, sort_findings

    if findings:
        findings = sort_findings(findings)
        print(render(findings, format), file=sys.stderr)
        if format == "text":
            print(f"\n{len(findings)} finding{'s' if len(findings) != 1 else ''}", file=sys.stderr)
