"""`tokenmix show`: a spec as resolved with its stage tree, or a block or op with what it takes and costs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from tokenmix.cli.specs import add_set, tell
from tokenmix.cli.tables import giga, mega, shape, table

if TYPE_CHECKING:
    from tokenmix.blocks.op import Op
    from tokenmix.compiler.definition import Definition
    from tokenmix.compiler.graph import BlockGraph
    from tokenmix.compiler.model import Model

_DOC = """examples:
  tokenmix show mixformer_b4                 the resolved spec and its tree
  tokenmix show mixformer_b4 --depth 3       the tree down to the layers of each block
  tokenmix show block mixing_attention       signature, doc, definition and cost of a block
  tokenmix show op window_attention          the same of a primitive op"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _DOC
    parser.add_argument("what", nargs="+", metavar="SPEC | block NAME | op NAME", help="what to show")
    add_set(parser)
    parser.add_argument("--size", metavar="SIZE", help="input size of the tree, 224 or HEIGHTxWIDTH")
    parser.add_argument("--depth", type=int, default=1, help="levels of the tree below the stages (default 1)")


def run(options: argparse.Namespace) -> int:
    kind, *names = options.what
    if kind in ("block", "op") and len(names) == 1:
        return _show_callable(kind, names[0])
    if names:
        print("error: show takes one spec, or `block NAME`, or `op NAME`", file=sys.stderr)
        return 2
    from tokenmix.compiler.model import load, parse_size

    model = load(kind, **dict(options.set))
    if model.is_family:
        print(_parameters(model))
        return 0
    if model.findings:
        tell(model.findings)
        return 1
    try:
        size = parse_size(options.size) if options.size else None
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    graph = model.elaborate(size)
    print(_parameters(model))
    print(f"\ninput {shape(graph.inputs[0].dims)}")
    print(_tree(graph, options.depth))
    return 0


def _parameters(model: Model) -> str:
    from tokenmix.dsl.expressions import describe

    spec = model.spec
    assert spec is not None
    title = ", ".join(spec.paper[k] for k in ("title", "venue") if k in spec.paper)
    lines = [f"{model.name}" + (f": {title}" if title else "")]
    lines += spec.status.lines()
    if spec.doc:
        lines += ["", spec.doc.strip()]
    rows = []
    overridden = set(model.overrides)
    for name, declared in spec.parameters.items():
        if model.plan is None:
            value = "(to be given)" if declared.default is None else declared.default.span.text
        else:
            value = describe(model.plan.parameters[name])
        if name in overridden:
            place = "--set"
        elif name in spec.values:
            place = str(spec.values[name][0].key(name).span)
        else:
            place = str(declared.span)
        rows.append([name, value, place, declared.doc])
    return "\n".join(
        [*lines, "", table(["parameter", "value", "set at", "what it is"], rows, "table", left=(0, 1, 2, 3))]
    )


def _tree(graph: BlockGraph, depth: int) -> str:
    rows: list[list[str]] = []
    _branch(graph, "", depth, rows)
    rows.append(["total", "", "", mega(graph.num_params), giga(sum(int(r[5]) for r in rows if r[6] == "0"))])
    return table(["name", "block", "output", "params [M]", "mac [G]"], [r[:5] for r in rows], "table", left=(0, 1, 2))


def _branch(graph: BlockGraph, indent: str, depth: int, rows: list[list[str]]) -> None:
    from tokenmix.blocks.cost import CONVENTIONS
    from tokenmix.compiler.graph import BlockGraph

    for first, last in _equal_runs(graph):
        node = graph.nodes[first]
        count = last - first
        name = node.name if count == 1 else f"{node.name} .. {graph.nodes[last - 1].name.rpartition('.')[2]}"
        macs = sum(n.count(CONVENTIONS["mac"]) for n in graph.nodes[first:last])
        params = sum(n.num_params for n in graph.nodes[first:last])
        output = graph.nodes[last - 1].outputs[0]
        times = f" x {count}" if count > 1 else ""
        rows.append(
            [
                indent + name,
                node.target.name + times,
                f"{output.kind} {shape(output.dims)}",
                mega(params),
                giga(macs),
                str(macs),
                str(len(indent)),
            ]
        )
        if depth > 1 and isinstance(node.target, BlockGraph):
            _branch(node.target, indent + "  ", depth - 1, rows)


def _equal_runs(graph: BlockGraph):
    """Stretches of neighbouring nodes that are one shared block."""
    from tokenmix.compiler.graph import BlockGraph

    nodes, first = graph.nodes, 0
    for i in range(1, len(nodes) + 1):
        if (
            i == len(nodes)
            or nodes[i].target is not nodes[first].target
            or not isinstance(nodes[first].target, BlockGraph)
        ):
            yield first, i
            first = i


def _show_callable(kind: str, name: str) -> int:
    from tokenmix.blocks.op import Op
    from tokenmix.compiler.library import Library
    from tokenmix.dsl.diagnostics import nearest

    library = Library()
    found = library.find(name)
    if found is None or isinstance(found, Op) != (kind == "op"):
        known = [n for n in library.names() if isinstance(library.find(n), Op) == (kind == "op")]
        near = nearest(name, known)
        hint = f"did you mean `{near[0]}`?" if near else f"`tokenmix list {kind}s` shows all"
        print(f"error: no {kind} is called `{name}`; {hint}", file=sys.stderr)
        return 1
    print(_op_text(found) if isinstance(found, Op) else _block_text(found, library))
    return 0


def _op_text(op: Op) -> str:
    import inspect

    return f"{op.signature_text}\n\n{inspect.cleandoc(op.doc)}"


def _block_text(definition: Definition, library) -> str:
    span = definition.block.span
    text = span.text.rstrip("# \n")  # the span may reach into the next block's comment
    lines = [*definition.block.doc, "", f"defined at {span}", "", text]
    cost = _example_cost(definition, library)
    return "\n".join([*lines, *(["", cost] if cost else [])])


def _example_cost(definition: Definition, library) -> str:
    """Parameters and multiply-adds as the first shipped spec that has the block uses it."""
    from tokenmix.blocks.cost import CONVENTIONS
    from tokenmix.compiler.graph import BlockGraph
    from tokenmix.compiler.model import load
    from tokenmix.compiler.spec import shipped_specs
    from tokenmix.dsl.expressions import describe

    def search(graph: BlockGraph) -> BlockGraph | None:
        for node in graph.nodes:
            if isinstance(node.target, BlockGraph):
                found = node.target if node.target.definition is definition else search(node.target)
                if found is not None:
                    return found
        return None

    for name in shipped_specs():
        model = load(name)
        if model.findings:
            continue
        graph = search(model.elaborate())
        if graph is not None:
            settings = ", ".join(f"{k}={describe(v)}" for k, v in graph.arguments.items())
            inputs = ", ".join(str(t) for t in graph.inputs)
            return (
                f"in {name}, with {settings or 'no hyperparameters'} on {inputs}:\n"
                f"{graph.num_params:,} parameters, {graph.count(CONVENTIONS['mac']):,} multiply-adds"
            )
    return ""
