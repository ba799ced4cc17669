"""A model: a spec with its numbers, ready to be counted, drawn and emitted. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmix.blocks.cost import Convention, Tally
from tokenmix.blocks.op import Op, Tensor
from tokenmix.compiler.elaborate import Elaborator, Failed
from tokenmix.compiler.graph import BlockGraph, GraphNode, Ref
from tokenmix.compiler.library import Library
from tokenmix.compiler.plan import Plan, Site, make_plan
from tokenmix.compiler.spec import Spec, find_spec, read_spec
from tokenmix.compiler.verify import dead_values
from tokenmix.dsl.diagnostics import Finding, FindingsError, Mistake, Note, sort_findings
from tokenmix.dsl.limits import MAX_NODES

if TYPE_CHECKING:
    import networkx

__all__ = ["Cost", "Model", "assemble", "load", "parse_size"]

# An input this wide or high is a mistake, and its counts would leave the range of exact 64-bit sizes.
_MAX_SIDE = 100_000


def parse_size(size: int | str | tuple[int, int]) -> tuple[int, int]:
    """Height and width from `224`, `"224"`, `"256x320"` (height first) or `(256, 320)`. Raises `ValueError`."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*[xX]\s*(\d{1,9}))?\s*", size)
        if not match:
            raise ValueError(f"a size is a number or HEIGHTxWIDTH, got {size!r}")
        return int(match[1]), int(match[2] or match[1])
    height, width = size
    return height, width


class Cost:
    """Exact counts of a model at one input shape, for one image.

    Attributes:
        input: (channels, height, width).
        params: learnable parameters.
        tally: the record that every convention weighs.
    """

    def __init__(self, graph: BlockGraph, conventions: Mapping[str, Convention]):
        self.graph = graph
        self.input: tuple[int, int, int] = graph.inputs[0].dims  # type: ignore[assignment]
        self.params = graph.num_params
        self.tally: Tally = graph.tally
        self._conventions = conventions

    def __getitem__(self, name: str) -> int:
        """The cost under a convention, or one tally, or `params`. Raises `KeyError`."""
        if name == "params":
            return self.params
        if name in self._conventions:
            return self.graph.count(self._conventions[name])
        return self.tally[name]

    def as_dict(self) -> dict[str, int]:
        """Every convention by name."""
        return {name: self[name] for name in self._conventions}

    def __repr__(self) -> str:
        return f"Cost(input={self.input}, params={self.params}, mac={self['mac']})"


class Model:
    """A loaded spec. Wrong specs load too: `findings` says what is wrong, and using the model raises it.

    Attributes:
        name: the spec's name.
        spec: the text behind it, bases folded in; None if it could not be read.
        findings: mistakes found at the default input size, sorted by place.
    """

    def __init__(
        self, spec: Spec | None, plan: Plan | None, findings: list[Finding], name: str, overrides: Mapping[str, Any]
    ):
        self.spec = spec
        self.overrides = overrides
        self.plan = plan
        self.name = name
        self._findings = findings
        self._graphs: dict[tuple, BlockGraph | tuple[Finding, ...]] = {}
        self._elaborator = _elaborator(plan.library) if plan else None

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        findings = list(self._findings)
        if self.plan is not None:
            graph = self._elaborated(self.input_shape, False)
            findings += dead_values(graph) if isinstance(graph, BlockGraph) else graph
        return tuple(sort_findings(findings))

    @property
    def is_family(self) -> bool:
        """Whether the spec is a base whose parameters have no values yet."""
        return self.plan is None and self.spec is not None and self.spec.is_family and not self.overrides

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of an image where none is asked for: (channels, height, width)."""
        return (self.spec.input if self.spec else None) or (3, 224, 224)

    @property
    def conventions(self) -> Mapping[str, Convention]:
        assert self.spec is not None
        return self.spec.conventions

    @property
    def graph(self) -> networkx.DiGraph:
        """The spelled-out graph at the default input size (see `BlockGraph.flatten`). Raises `FindingsError`."""
        return self.elaborate().flatten()

    def elaborate(self, size: int | str | tuple[int, int] | None = None, *, dense: bool = False) -> BlockGraph:
        """The graph at an input size: the classifier, or with `dense` the backbone with its four normed maps.

        Raises:
            FindingsError: if the spec has findings or does not take that size.
        """
        shape = self.input_shape
        if size is not None:
            shape = (shape[0], *parse_size(size))
        graph = self._elaborated(shape, dense) if self.plan else tuple(self._findings)
        if not isinstance(graph, BlockGraph):
            raise FindingsError(graph)
        return graph

    def cost(self, size: int | str | tuple[int, int] | None = None, *, dense: bool = False) -> Cost:
        """Exact counts at an input size. Raises `FindingsError` as `elaborate` does."""
        return Cost(self.elaborate(size, dense=dense), self.conventions)

    def source(self, *, standalone: bool = False) -> str:
        """The PyTorch source of the model. Raises `FindingsError`."""
        from tokenmix.compiler.emit import emit

        if self.findings:
            raise FindingsError(self.findings)
        return emit(self, standalone=standalone)

    def _elaborated(self, shape: tuple[int, int, int], dense: bool) -> BlockGraph | tuple[Finding, ...]:
        key = (shape, dense)
        if key not in self._graphs:
            assert self.plan is not None and self.spec is not None and self._elaborator is not None
            if not all(0 < side <= _MAX_SIDE for side in shape[1:]):
                height, width = shape[1:]
                finding = Finding("TM1404", f"an input has 1 to {_MAX_SIDE} pixels per side, got {height}x{width}")
                self._graphs[key] = (finding,)
            else:
                self._graphs[key] = assemble(self.name, self.plan, self._elaborator, shape, dense)
        return self._graphs[key]


_SHARED: dict[int, Elaborator] = {}


def _elaborator(library: Library) -> Elaborator:
    """One elaborator per library: specs without blocks of their own share every elaborated block."""
    return _SHARED.setdefault(id(library), Elaborator(library)) if not library.own() else Elaborator(library)


def assemble(
    name: str, plan: Plan, elaborator: Elaborator, shape: tuple[int, int, int], dense: bool
) -> BlockGraph | tuple[Finding, ...]:
    """The graph of a whole model from its placed blocks, or what forbids it."""
    return _Assembly(name, elaborator, shape).run(plan, dense)


class _Assembly:
    def __init__(self, name: str, elaborator: Elaborator, shape: tuple[int, int, int]):
        self.elaborator = elaborator
        self.graph = BlockGraph(name, None, {}, (Tensor("map", shape),))
        self._num_ops = 0

    def run(self, plan: Plan, dense: bool) -> BlockGraph | tuple[Finding, ...]:
        self.elaborator.findings = []
        try:
            ref = Ref(-1, 0)
            if plan.stem is not None:
                ref = self._add(plan.stem, ref)
            maps = []
            for stage in plan.stages:
                for site in (stage.down, *stage.blocks, stage.body):
                    if site is not None:
                        ref = self._add(site, ref)
                maps.append(ref)
            if dense:
                if plan.norms:
                    maps = [self._add(site, ref) for site, ref in zip(plan.norms, maps, strict=True)]
                self.graph.results = tuple(maps)
            else:
                self.graph.results = (self._add(plan.head, ref) if plan.head else ref,)
        except Failed:
            pass
        except Mistake as mistake:
            self.elaborator.findings.append(mistake.finding)
        findings = tuple(self._with_size(f) for f in sort_findings(self.elaborator.findings))
        return findings or self.graph

    def _add(self, site: Site, ref: Ref) -> Ref:
        tensor = self.graph.tensor(ref)
        try:
            target, outputs = self.elaborator.call(site.call, site.arguments, (tensor,))
        except Mistake as mistake:
            finding = mistake.finding
            raise Mistake(finding.id, finding.message, finding.span or site.call.span, notes=finding.notes, help=finding.help) from None
        if len(outputs) > 1:
            raise Mistake("TM1306", f"`{site.call.callee}` gives {len(outputs)} values, a model passes one on", site.call.span)
        weights, tally = {}, Tally()
        if isinstance(target, Op):
            weights = dict(target.weights(tensor, **site.arguments))
            tally = target.cost((tensor,), outputs, **site.arguments)
        node = GraphNode(site.name, site.name, target, site.arguments, (ref,), outputs, site.call.span, weights, tally)
        self.graph.nodes.append(node)
        self._num_ops += node.num_ops
        if self._num_ops > MAX_NODES:
            raise Mistake("TM1502", f"the model grows past {MAX_NODES} ops", site.call.span)
        return Ref(len(self.graph.nodes) - 1, 0)

    def _with_size(self, finding: Finding) -> Finding:
        """Input size and, where the finding is about a size, the sizes near by that the model does take."""
        channels, height, width = self.graph.inputs[0].dims
        note = Note(f"for an input of {channels}x{height}x{width}")
        return replace(finding, notes=(*finding.notes, note)) if finding.id in ("TM1403", "TM1404", "TM1402") else finding


def load(spec: str | Path, **overrides: Any) -> Model:
    """Load a spec by path or by the name of a shipped one; keywords set its parameters. Needs no torch.

    Never raises for a wrong spec: see `Model.findings`.

    Example:
        >>> load("mixformer_b4").cost()["mac"]
        3475237888
    """
    findings: list[Finding] = []
    path = find_spec(str(spec), findings)
    document = read_spec(path, findings) if path is not None else None
    plan = None
    if document is not None:
        if not findings:
            plan = make_plan(document, overrides, findings)
        elif not any(f.id.startswith("TM10") or f.id.startswith("TM11") for f in findings):
            make_plan(document, overrides, findings)  # for its findings: names and types can be checked all the same
    name = document.name if document else Path(str(spec)).stem
    return Model(document, plan, list(dict.fromkeys(findings)), name, overrides)
