"""The dataflow of a whole model, op by op, as the passes read it and change it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from tokenmix.blocks.op import Op, Tensor
from tokenmix.compiler.bind import hyperparameters
from tokenmix.compiler.blame import reads
from tokenmix.compiler.definition import Definition, statements
from tokenmix.compiler.graph import BlockGraph, Ref
from tokenmix.compiler.library import Library
from tokenmix.compiler.model import Model
from tokenmix.compiler.plan import make_draft
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding
from tokenmix.dsl.source import Span

__all__ = ["Flow", "FlowOp", "depends_on_size", "flows_of"]

# An output of an op: the name of the op, or an empty one for the image, and the number of the output.
Origin = tuple[str, int]


@dataclass
class FlowOp:
    """One op of the spelled-out model.

    Attributes:
        module: path of its submodule.
        block: the path's part in front of its label, the block's own.
        inputs: where its inputs come from.
        span: the call in the text of its block, by which a pass can have it rewritten; None where it cannot be: what
            the spec itself places, and layers whose weights are used more than once.
    """

    op: Op
    module: str
    block: str
    arguments: dict[str, Any]
    inputs: list[Origin]
    outputs: tuple[Tensor, ...]
    span: Span | None


@dataclass
class Flow:
    """A model spelled out.

    Attributes:
        image: what comes in.
        ops: name -> op, in the order they run.
        results: where the results come from.
        definitions: the blocks it is made of.
    """

    image: Tensor
    ops: dict[str, FlowOp] = field(default_factory=dict)
    results: list[Origin] = field(default_factory=list)
    definitions: set[Definition] = field(default_factory=set)
    _readers: dict[Origin, list[tuple[str, int]]] = field(default_factory=dict)

    def readers(self, name: str) -> list[tuple[str, int]]:
        """Who reads the first output of an op: names with the number of the input, `result` for the results."""
        if not self._readers:
            for reader, op in self.ops.items():
                for i, origin in enumerate(op.inputs):
                    self._readers.setdefault(origin, []).append((reader, i))
            for i, origin in enumerate(self.results):
                self._readers.setdefault(origin, []).append(("result", i))
        return self._readers.get((name, 0), [])

    def only_reader(self, name: str) -> str:
        """Who alone reads the first output of an op, and once; empty if there are none or several."""
        readers = self.readers(name)
        return readers[0][0] if len(readers) == 1 else ""

    def tensor(self, origin: Origin) -> Tensor:
        return self.ops[origin[0]].outputs[origin[1]] if origin[0] else self.image

    def bypass(self, spans: set[Span]) -> None:
        """Take out the ops that calls became: who read their output reads their first input."""
        gone = {name: op.inputs[0] for name, op in self.ops.items() if op.span in spans}
        self.ops = {name: op for name, op in self.ops.items() if name not in gone}

        def origin(of: Origin) -> Origin:
            while of[0] in gone:
                of = gone[of[0]]
            return of

        for op in self.ops.values():
            op.inputs = [origin(o) for o in op.inputs]
        self.results = [origin(o) for o in self.results]
        self._readers = {}


def flows_of(model: Model, size: int | str | tuple[int, int] | None) -> list[Flow]:
    """The dataflow of everything that one emitted source can build: the classifier, the backbone with the maps of all
    stages if the spec has one, the model without classes.

    Raises:
        FindingsError: if the model has findings, or does not take that size.
    """
    assert model.plan is not None and model.spec is not None
    library = model.plan.library
    graphs = [model.elaborate(size)]
    graphs += [model.elaborate(size, dense=True)] if model.plan.norms else []
    if "classes" in model.plan.parameters:
        findings: list[Finding] = []
        draft = make_draft(model.spec, {**model.overrides, "classes": 0}, findings)
        if draft is not None and not findings:
            bare = Model(model.spec, replace(draft, library=library), [], model.name, model.overrides)
            graphs += [] if bare.findings else [bare.elaborate(size)]
    return [_flow(graph, library) for graph in graphs]


def _flow(graph: BlockGraph, library: Library) -> Flow:
    flow = Flow(graph.inputs[0], definitions=set(_definitions(graph)))
    calls = {
        span
        for definition in flow.definitions
        for span, call in definition.calls.items()
        if call.callee not in definition.modules and isinstance(library.find(call.callee), Op)
    }
    flow.results = _spell_out(flow, graph, "", "", [("", 0)])
    uses = Counter(op.module for op in flow.ops.values())
    for op in flow.ops.values():
        if op.span not in calls or uses[op.module] > 1:
            op.span = None
    return flow


def _spell_out(flow: Flow, graph: BlockGraph, prefix: str, module: str, sources: list[Origin]) -> list[Origin]:
    values: list[list[Origin]] = []

    def origins(refs: Iterable[Ref]) -> list[Origin]:
        return [sources[ref.output] if ref.node < 0 else values[ref.node][ref.output] for ref in refs]

    for node in graph.nodes:
        name, path, inputs = prefix + node.name, module + node.label, origins(node.inputs)
        if isinstance(node.target, BlockGraph):
            values.append(_spell_out(flow, node.target, f"{name}.", f"{path}.", inputs))
        else:
            flow.ops[name] = FlowOp(node.target, path, module, node.arguments, inputs, node.outputs, node.span)
            values.append([(name, i) for i in range(len(node.outputs))])
    return origins(graph.results)


def _definitions(graph: BlockGraph) -> Iterator[Definition]:
    if graph.definition is not None:
        yield graph.definition
    for node in graph.nodes:
        if isinstance(node.target, BlockGraph):
            yield from _definitions(node.target)


def depends_on_size(definition: Definition, library: Library) -> bool:
    """Whether the size of the image may decide which arm of an `if` a block takes, or what another block is told.

    The dataflow at one size says nothing about the other arm.
    """
    named = {"H", "W", "N"}

    def read(node: object) -> bool:
        return any((n.dim or n.name) in named for n in reads(node))

    for _ in range(2):  # a loop may read what its last line says
        for statement in statements(definition.block.body):
            if isinstance(statement, syntax.Assign) and read(statement.value):
                named |= {target.name for target in statement.targets}
    if any(isinstance(s, syntax.If) and read(s.condition) for s in statements(definition.block.body)):
        return True
    blocks = [(call, library.find(call.callee)) for call in definition.calls.values()]
    return any(
        read(argument.value)
        for call, target in blocks
        if isinstance(target, Definition)
        for argument in hyperparameters(target.signature, call)
    )
