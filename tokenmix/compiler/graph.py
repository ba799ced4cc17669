"""The graph of primitive ops, kept in shared pieces: a block used ten times with equal shapes is one piece.

Totals are summed over the pieces. `flatten` spells the whole model out as one networkx graph with hierarchical names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenmix.blocks.cost import Convention, Tally
from tokenmix.blocks.op import Op, Tensor, size
from tokenmix.dsl.source import Span

if TYPE_CHECKING:
    import networkx

    from tokenmix.compiler.definition import Definition

__all__ = ["BlockGraph", "GraphNode", "Ref"]


class Ref(NamedTuple):
    """Output number `output` of a node, or (node -1) input number `output` of the block itself."""

    node: int
    output: int


@dataclass(frozen=True, eq=False)
class GraphNode:
    """One op or block in a block.

    Attributes:
        name: name in its block, dots included (`blocks.3`); two uses of one module are `peg` and `peg@2`.
        label: name of the submodule, the same for both uses.
        target: the op, or the shared graph of the block.
        arguments: hyperparameters by name.
        weights: learnable parameters, name -> shape. Empty where `reused`.
        tally: exact counts of an op for one image.
        reused: whether the weights were counted at an earlier use of the same module.
    """

    name: str
    label: str
    target: Op | BlockGraph
    arguments: dict[str, Any]
    inputs: tuple[Ref, ...]
    outputs: tuple[Tensor, ...]
    span: Span | None
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    reused: bool = False

    @property
    def num_params(self) -> int:
        if self.reused:
            return 0
        if isinstance(self.target, BlockGraph):
            return self.target.num_params
        return sum(prod(shape) for shape in self.weights.values())

    @property
    def total(self) -> Tally:
        return self.target.tally if isinstance(self.target, BlockGraph) else self.tally

    @property
    def num_ops(self) -> int:
        return self.target.num_ops if isinstance(self.target, BlockGraph) else 1

    def count(self, convention: Convention) -> int:
        """The node's cost under a convention."""
        if self.label.rsplit(".", 1)[-1] in convention.without:
            return 0
        if isinstance(self.target, BlockGraph) and convention.without:
            return self.target.count(convention)
        return convention.total(self.total)


@dataclass(eq=False)
class BlockGraph:
    """What a block becomes for given hyperparameters and input shapes; nodes stand in the order they run."""

    name: str
    definition: Definition | None
    arguments: dict[str, Any]
    inputs: tuple[Tensor, ...]
    nodes: list[GraphNode] = field(default_factory=list)
    results: tuple[Ref, ...] = ()

    def tensor(self, ref: Ref) -> Tensor:
        return self.inputs[ref.output] if ref.node < 0 else self.nodes[ref.node].outputs[ref.output]

    @cached_property
    def outputs(self) -> tuple[Tensor, ...]:
        return tuple(self.tensor(ref) for ref in self.results)

    @cached_property
    def tally(self) -> Tally:
        return Tally.sum(node.total for node in self.nodes)

    @cached_property
    def num_params(self) -> int:
        return sum(node.num_params for node in self.nodes)

    @cached_property
    def num_ops(self) -> int:
        return sum(node.num_ops for node in self.nodes)

    @cached_property
    def activation_elements(self) -> int:
        """Elements written by all ops together, for one image; views write nothing."""
        return sum(
            node.target.activation_elements
            if isinstance(node.target, BlockGraph)
            else 0
            if node.target.is_view
            else sum(size(t) for t in node.outputs)
            for node in self.nodes
        )

    def count(self, convention: Convention) -> int:
        """Cost of the whole block under a convention."""
        if not convention.without:
            return convention.total(self.tally)
        cache = self.__dict__.setdefault("_counts", {})
        if convention.name not in cache:
            cache[convention.name] = sum(node.count(convention) for node in self.nodes)
        return cache[convention.name]

    def walk(
        self, prefix: str = "", module: str = "", reused: bool = False
    ) -> Iterator[tuple[str, str, GraphNode, bool]]:
        """Every primitive op of the spelled-out graph: name, path of its module, node, whether weights are reused."""
        for node in self.nodes:
            name, path = prefix + node.name, module + node.label
            if isinstance(node.target, BlockGraph):
                yield from node.target.walk(name + ".", path + ".", reused or node.reused)
            else:
                yield name, path, node, reused or node.reused

    def flatten(self) -> networkx.DiGraph:
        """The spelled-out graph.

        Nodes are named hierarchically; `input` and `output` stand for the images and the result. Attributes: `op`,
        `module`, `outputs` (tensors), `tally`, `num_params`, `arguments`, `span`. Edges carry `uses`: pairs of
        (output number, input number).
        """
        import networkx

        graph = networkx.DiGraph(name=self.name)
        graph.add_node("input", op=None, outputs=self.inputs, tally=Tally(), num_params=0)
        sources = [("input", i) for i in range(len(self.inputs))]
        results = self._spell_out(graph, "", "", sources, False)
        graph.add_node("output", op=None, outputs=self.outputs, tally=Tally(), num_params=0)
        for i, result in enumerate(results):
            _connect(graph, result, "output", i)
        return graph

    def _spell_out(
        self, graph: networkx.DiGraph, prefix: str, module: str, sources: list[tuple[str, int]], reused: bool
    ) -> list[tuple[str, int]]:
        values: list[list[tuple[str, int]]] = []

        def origin(ref: Ref) -> tuple[str, int]:
            return sources[ref.output] if ref.node < 0 else values[ref.node][ref.output]

        for node in self.nodes:
            name = prefix + node.name
            inputs = [origin(ref) for ref in node.inputs]
            if isinstance(node.target, BlockGraph):
                values.append(
                    node.target._spell_out(graph, name + ".", f"{module}{node.label}.", inputs, reused or node.reused)
                )
                continue
            graph.add_node(
                name,
                op=node.target,
                module=module + node.label,
                outputs=node.outputs,
                tally=node.tally,
                num_params=0 if reused else node.num_params,
                arguments=node.arguments,
                span=node.span,
            )
            for i, source in enumerate(inputs):
                _connect(graph, source, name, i)
            values.append([(name, i) for i in range(len(node.outputs))])
        return [origin(ref) for ref in self.results]


def _connect(graph: networkx.DiGraph, source: tuple[str, int], target: str, position: int) -> None:
    name, output = source
    if graph.has_edge(name, target):
        graph.edges[name, target]["uses"].append((output, position))
    else:
        graph.add_edge(name, target, uses=[(output, position)])
