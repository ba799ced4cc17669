"""`tokenmix list`: the specs, blocks and ops there are, a line each."""

from __future__ import annotations

import argparse
import re

from tokenmix.cli.tables import table

KINDS = ("specs", "blocks", "ops")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: tokenmix list ops"
    parser.add_argument("kind", nargs="?", choices=KINDS, help="one kind only")
    parser.add_argument(
        "--format", choices=("table", "json", "csv", "markdown"), default="table", help="form of the list"
    )


def run(options: argparse.Namespace) -> int:
    kinds = [options.kind] if options.kind else list(KINDS)
    rows = {kind: _ROWS[kind]() for kind in kinds}
    if options.format == "json":
        import json

        print(json.dumps({"schema": 1} | {k: [{"name": n, "doc": d} for n, d in r] for k, r in rows.items()}, indent=2))
        return 0
    parts = []
    for kind, lines in rows.items():
        text = table([kind, "what it is"], [[name, doc] for name, doc in lines], options.format, left=(0, 1))
        parts.append(text)
    print("\n\n".join(parts))
    return 0


def _specs() -> list[tuple[str, str]]:
    from tokenmix.compiler.model import load
    from tokenmix.compiler.spec import shipped_specs

    rows = []
    for name in shipped_specs():
        model = load(name)
        assert model.spec is not None, name
        title = model.spec.paper.get("title", "")
        rows.append((name, f"family: {title}" if model.is_family else f"{title} ({model.spec.paper.get('venue', '')})"))
    return rows


def _blocks() -> list[tuple[str, str]]:
    from tokenmix.compiler.library import Library, shipped_blocks

    library = Library()
    return [(name, _first(library.find(name).block.doc)) for name in sorted(shipped_blocks())]  # type: ignore[union-attr]


def _ops() -> list[tuple[str, str]]:
    from tokenmix.blocks.ops import find_op, op_names

    return [(name, _first(find_op(name).doc.split("\n"))) for name in op_names()]  # type: ignore[union-attr]


def _first(doc) -> str:
    """The first sentence of a doc comment."""
    text = " ".join(" ".join(line for line in doc if not line.startswith("Source:")).split())
    return re.split(r"\. (?=[A-Z`])", text)[0].rstrip(".")


_ROWS = {"specs": _specs, "blocks": _blocks, "ops": _ops}
