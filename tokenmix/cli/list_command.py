"""`tokenmix list`: the specs, blocks and ops there are, a line each."""

from __future__ import annotations

import argparse
import itertools
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

        keys = {"specs": ("name", "kind", "doc")}
        lists = {k: [dict(zip(keys.get(k, ("name", "doc")), r, strict=True)) for r in rs] for k, rs in rows.items()}
        print(json.dumps({"schema": 1} | lists, indent=2))
        return 0
    parts = []
    for kind, lines in rows.items():
        head = [kind, *(["kind"] if kind == "specs" else []), "what it is"]
        parts.append(table(head, lines, options.format, left=range(len(head))))
    print("\n\n".join(parts))
    return 0


def _specs() -> list[tuple[str, ...]]:
    """Family by family: the family itself, what extends it, its ablations."""
    from tokenmix.compiler.spec import shipped_specs
    from tokenmix.compiler.spec_reader import read_spec

    kinds = ("family", "variant", "model", "ablation")
    rows = []
    for name, path in shipped_specs().items():
        spec = read_spec(path, [])
        assert spec is not None, name
        is_ablation = path.parent.name == "ablations"
        kind = "ablation" if is_ablation else "family" if spec.is_family else "variant" if spec.bases else "model"
        title, venue = spec.paper.get("title", ""), spec.paper.get("venue", "")
        about = _first(spec.doc.split("\n")) if is_ablation and spec.doc else f"{title} ({venue})" if venue else title
        rows.append(((spec.family, kinds.index(kind)), (name, kind, about)))
    return [row for _, row in sorted(rows)]


def _blocks() -> list[tuple[str, ...]]:
    from tokenmix.compiler.library import Library, shipped_blocks

    library = Library()
    return [(name, _first(library.find(name).block.doc)) for name in sorted(shipped_blocks())]  # type: ignore[union-attr]


def _ops() -> list[tuple[str, ...]]:
    from tokenmix.blocks.ops import find_op, op_names

    return [(name, _first(find_op(name).doc.split("\n"))) for name in op_names()]  # type: ignore[union-attr]


def _first(doc) -> str:
    """The first sentence of a doc comment."""
    parts = ("Source:", "Stated:", "Forced by the numbers:", "Assumed:")
    text = " ".join(" ".join(itertools.takewhile(lambda line: not line.startswith(parts), doc)).split())
    return re.split(r"\. (?=[A-Z`])", text)[0].rstrip(".")


_ROWS = {"specs": _specs, "blocks": _blocks, "ops": _ops}
