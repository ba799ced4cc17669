"""`tokenmix fmt`: specs and block files in canonical form."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: tokenmix fmt --check specs/*.yaml my_blocks.mix"
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="a spec (.yaml) or block file (.mix)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is not in canonical form")
    mode.add_argument("--diff", action="store_true", help="change nothing; print what would change")


def run(options: argparse.Namespace) -> int:
    from tokenmix.cli.specs import tell
    from tokenmix.compiler.spec import SPEC_KEYS
    from tokenmix.dsl.diagnostics import Finding, FindingsError
    from tokenmix.dsl.files import read_text
    from tokenmix.dsl.formatter import format_text
    from tokenmix.runtime.files import write_whole

    findings: list[Finding] = []
    changed = []
    for path in options.files:
        source = read_text(path, findings)
        if source is None:
            continue
        try:
            text = format_text(source, tuple(SPEC_KEYS))
        except FindingsError as error:
            findings += error.findings
            continue
        if text == path.read_text(encoding="utf-8"):
            continue
        changed.append(path)
        if options.diff:
            before, after = source.text.splitlines(keepends=True), text.splitlines(keepends=True)
            sys.stdout.writelines(difflib.unified_diff(before, after, str(path), f"{path} (canonical)"))
        elif not options.check:
            write_whole(path, text)
            print(f"{path} rewritten")
        else:
            print(f"{path} is not in canonical form")
    tell(findings)
    return 1 if findings or (changed and (options.check or options.diff)) else 0
