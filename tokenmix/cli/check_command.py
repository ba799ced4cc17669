"""`tokenmix check`: every finding, no torch."""

from __future__ import annotations

import argparse

from tokenmix.cli.specs import add_set, add_specs, load_all, tell


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: tokenmix check specs/*.yaml"
    add_specs(parser)
    add_set(parser)
    parser.add_argument("--format", choices=("text", "json", "github"), default="text", help="form of the findings")


def run(options: argparse.Namespace) -> int:
    from tokenmix.dsl.diagnostics import render

    models = load_all(options.specs, options.set)
    findings = [f for m in models if not _family(m) for f in m.findings]
    if options.format == "json":
        print(render(findings, "json"))
    else:
        tell(findings, options.format)
    if not findings and options.format == "text":
        print(f"{len(models)} spec{'s' if len(models) != 1 else ''} checked, nothing found")
    return 1 if findings else 0


def _family(model) -> bool:
    """A base to extend: sound as far as it goes, complete only in the specs that extend it."""
    return model.is_family and all(f.id == "TM1205" for f in model.findings)
