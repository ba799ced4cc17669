"""What must hold of every graph: of shapes wherever an op is placed, of dead values in `check`, and of the whole graph,
in the tests, after every step that makes or changes one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenmix.blocks.cost import TALLIES
from tokenmix.blocks.op import KINDS, Tensor
from tokenmix.compiler.graph import BlockGraph
from tokenmix.dsl.diagnostics import Finding

if TYPE_CHECKING:
    import networkx

__all__ = ["GraphError", "dead_values", "verify", "verify_shapes"]


class GraphError(AssertionError):
    """A graph that the compiler must not make: a bug of ours, not of a spec."""


def verify(graph: networkx.DiGraph) -> None:
    """Raise `GraphError` if a flattened graph is not sound.

    It is acyclic and in running order; every op gets as many tensors as it takes, of kinds it takes; its outputs and
    tally are what its rules say; nothing but the output lacks a reader that leads to the output.
    """
    import networkx

    if not networkx.is_directed_acyclic_graph(graph):
        raise GraphError(f"cycle: {networkx.find_cycle(graph)}")
    position = {name: i for i, name in enumerate(graph)}
    for source, target in graph.edges:
        if position[source] >= position[target]:
            raise GraphError(f"{target} runs before its input {source}")
    for name, node in graph.nodes(data=True):
        verify_shapes(name, node["outputs"])
        if node["op"] is not None:
            _verify_op(graph, name, node)
    dead = set(graph) - networkx.ancestors(graph, "output") - {"output"}
    if dead:
        raise GraphError(f"never reaches the output: {sorted(dead)}")


def verify_shapes(name: str, outputs: tuple[Tensor, ...]) -> None:
    """Raise `GraphError` if a rule for shapes gives what no tensor has: its op's check lets too much pass.

    A row of tokens may be empty, such as the background where every token is in the foreground.
    """
    for tensor in outputs:
        letters = KINDS.get(tensor.kind, ())
        least = [0 if letter in "NM" else 1 for letter in letters]
        if len(letters) != len(tensor.dims) or any(
            not isinstance(d, int) or d < m for d, m in zip(tensor.dims, least, strict=True)
        ):
            raise GraphError(f"{name}: {tensor} is no shape")


def _verify_op(graph: networkx.DiGraph, name: str, node: dict) -> None:
    op = node["op"]
    reads = sorted(
        (into, source, output) for source, _, uses in graph.in_edges(name, data="uses") for output, into in uses
    )
    if [into for into, _, _ in reads] != list(range(len(reads))):
        raise GraphError(f"{name}: inputs {reads}")
    inputs = tuple(graph.nodes[source]["outputs"][output] for _, source, output in reads)
    wanted = op.signature.inputs
    for i, tensor in enumerate(inputs):
        kinds = wanted[min(i, len(wanted) - 1)].kinds
        if kinds and tensor.kind not in kinds:
            raise GraphError(f"{name}: takes no {tensor.kind}")
    outputs = op.shape(*inputs, **node["arguments"])
    if (outputs if isinstance(outputs, tuple) else (outputs,)) != node["outputs"]:
        raise GraphError(f"{name}: {node['outputs']} is not what its rule says")
    tally = op.cost(inputs, node["outputs"], **node["arguments"])
    if tally != node["tally"] or any(not isinstance(v, int) or v < 0 or k not in TALLIES for k, v in tally.items()):
        raise GraphError(f"{name}: tally {node['tally']}")


def dead_values(graph: BlockGraph) -> list[Finding]:
    """Values computed in the blocks of a model that never reach its output, one finding per place in the text."""
    findings: dict[tuple, Finding] = {}
    for piece in _pieces(graph, {}).values():
        needed = {ref.node for ref in piece.results}
        for i in range(len(piece.nodes) - 1, -1, -1):
            node = piece.nodes[i]
            if i in needed:
                needed |= {ref.node for ref in node.inputs}
            elif node.span is not None:
                key = (node.span.source.name, node.span.start)
                findings[key] = Finding(
                    "TM1405",
                    f"the result of `{node.label}` never reaches the output of `{piece.name}`",
                    node.span,
                    help="use it or leave it out: it costs time and weights",
                )
    return list(findings.values())


def _pieces(graph: BlockGraph, seen: dict[int, BlockGraph]) -> dict[int, BlockGraph]:
    if id(graph) not in seen:
        seen[id(graph)] = graph
        for node in graph.nodes:
            if isinstance(node.target, BlockGraph):
                _pieces(node.target, seen)
    return seen
