"""A model: a spec with its numbers, ready to be counted, drawn and emitted. Needs no torch."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmix.blocks.cost import Convention, Tally
from tokenmix.blocks.op import Op, Tensor
from tokenmix.compiler.blame import Place, Trace
from tokenmix.compiler.elaborate import Elaborator
from tokenmix.compiler.graph import BlockGraph, GraphNode, Ref
from tokenmix.compiler.library import Library
from tokenmix.compiler.outcomes import Exhausted, Failed
from tokenmix.compiler.plan import Plan, Site, make_draft
from tokenmix.compiler.spec import Spec, find_spec
from tokenmix.compiler.spec_reader import read_spec
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
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*[xX]\s*(\d{1,9}))?\s*", size, re.ASCII)
        if not match:
            raise ValueError(f"a size is a number or HEIGHTxWIDTH, got {size!r}")
        return int(match[1]), int(match[2] or match[1])
    try:
        if not isinstance(size, tuple | list):
            return operator.index(size), operator.index(size)
        height, width = size
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise ValueError(f"a size is a number, HEIGHTxWIDTH or (height, width), got {size!r}") from None


class Cost:
    """Exact counts of a model at one input shape, for one image.

    Attributes:
        input: (channels, height, width).
        params: learnable parameters.
        tally: the record that every convention weighs.
    """

    def __init__(self, graph: BlockGraph, conventions: Mapping[str, Convention]):
        self.graph = graph
        self.input: tuple[int, int, int] = graph.inputs[0].dims
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
        plan: its blocks with their numbers; None where findings forbid.
        findings: mistakes found at the default input size, sorted by place.
        fixed_size: height and width of every image that its module takes; None for any.
    """

    fixed_size: tuple[int, int] | None = None

    def __init__(
        self, spec: Spec | None, draft: Plan | None, findings: list[Finding], name: str, overrides: Mapping[str, Any]
    ):
        self.spec = spec
        self.overrides = overrides
        self.plan = draft if not findings else None
        self.name = name
        self._draft = draft
        self._findings = list(dict.fromkeys(findings))
        self._graphs: dict[tuple, BlockGraph | tuple[Finding, ...]] = {}
        self._elaborator = _elaborator(draft.library) if draft else None

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        findings = list(self._findings)
        if self.plan is not None:
            graph = self._elaborated(self.input_shape, False)
            findings += dead_values(graph) if isinstance(graph, BlockGraph) else graph
        elif self._draft is not None and self._elaborator is not None:
            # Up to the first block with a finding, the sizes can be looked at all the same.
            graph = assemble(self.name, self._draft, self._elaborator, self.input_shape, False)
            findings += graph if not isinstance(graph, BlockGraph) else ()
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
        """The graph at an input size: the classifier, or with `dense` the backbone with the maps of all stages.

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
                message = f"an input has 1 to {_MAX_SIDE:,} pixels per side, got {height}x{width}"
                name = self.spec.root.get("name")
                self._graphs[key] = (Finding("TM1404", message, name.span if name else self.spec.root.span),)
            else:
                graph = assemble(self.name, self.plan, self._elaborator, shape, dense)
                self._graphs[key] = graph if isinstance(graph, BlockGraph) else self._with_sizes(graph, shape, dense)
        return self._graphs[key]

    def _with_sizes(
        self, findings: tuple[Finding, ...], shape: tuple[int, int, int], dense: bool
    ) -> tuple[Finding, ...]:
        """Findings about an input size, with the sizes near by that the model takes."""
        if any(f.id != "TM1404" for f in findings):
            return findings
        fits: list[tuple[int, int]] = []
        for smaller in (True, False):
            for step in (2, 4, 7, 8, 14, 16, 28, 32, 48, 56, 64, 96, 112, 128):
                sides = [side // step * step if smaller else -(-side // step) * step for side in shape[1:]]
                size = (sides[0], sides[1])
                if all(0 < side <= _MAX_SIDE for side in size) and size != shape[1:]:
                    other = assemble(self.name, self.plan, self._elaborator, (shape[0], *size), dense)  # type: ignore[arg-type]
                    if isinstance(other, BlockGraph):
                        fits.append(size)
                        break
        if not fits:
            return findings
        help = f"near sizes that it takes: {' and '.join(f'{h}x{w}' for h, w in dict.fromkeys(fits))}"
        return tuple(replace(f, help=f"{f.help}; {help}" if f.help else help) for f in findings)


_SHARED: list[Elaborator] = []


def _elaborator(library: Library) -> Elaborator:
    """Specs without blocks of their own share every elaborated block."""
    if not library.plain:
        return Elaborator(library)
    if not _SHARED:
        _SHARED.append(Elaborator(Library()))
    return _SHARED[0]


def assemble(
    name: str, plan: Plan, elaborator: Elaborator, shape: tuple[int, int, int], dense: bool
) -> BlockGraph | tuple[Finding, ...]:
    """The graph of a whole model from its placed blocks, or what forbids it."""
    return _Assembly(name, plan, elaborator, shape).run(dense)


class _Assembly:
    def __init__(self, name: str, plan: Plan, elaborator: Elaborator, shape: tuple[int, int, int]):
        self.plan = plan
        self.elaborator = elaborator
        self.graph = BlockGraph(name, None, {}, (Tensor("map", shape),))
        self._trunk: list[tuple[Site, Tensor, Tensor]] = []
        self._failed = False
        self._num_ops = 0

    def run(self, dense: bool) -> BlockGraph | tuple[Finding, ...]:
        plan = self.plan
        self.elaborator.begin()
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
        except (Failed, Exhausted):
            self._failed = True
        except Mistake as mistake:
            self._failed = True
            self.elaborator.findings.append(mistake.finding)
        if not self._failed:
            return self.graph
        return tuple(self._with_input(f) for f in sort_findings(self.elaborator.findings))

    def _add(self, site: Site, ref: Ref) -> Ref:
        tensor = self.graph.tensor(ref)
        self.elaborator.at(site.name, lambda found: self._blamed(site, found))
        try:
            target, outputs = self.elaborator.call(site.call, site.arguments, (tensor,))
        except Failed as failed:
            # Blocks that keep the shape leave no doubt about what the next one gets.
            if failed.outputs != (tensor,):
                raise
            self._failed = True
            return ref
        except RecursionError:
            message = f"the blocks under `{site.call.callee}` and the expressions in them are nested too deep"
            raise Mistake("TM1104", message, site.call.span, help="name inner parts on lines of their own") from None
        except Mistake as mistake:
            raise self._placed(site, mistake) from None
        if len(outputs) > 1:
            raise Mistake(
                "TM1306",
                f"`{site.call.callee}` gives {len(outputs)} values, a model passes one on",
                site.call.span,
                help="put it into a block that returns one of them",
            )
        weights, tally = {}, Tally()
        if isinstance(target, Op):
            if target.module(tensor, **site.arguments) is None:
                raise Mistake(
                    "TM1702",
                    f"`{site.call.callee}` is a function; a model is put together from layers and blocks",
                    site.call.callee_span,
                    help="put it into a block under `definitions`",
                )
            weights = dict(target.weights(tensor, **site.arguments))
            tally = target.cost((tensor,), outputs, **site.arguments)
        node = GraphNode(site.name, site.name, target, site.arguments, (ref,), outputs, site.call.span, weights, tally)
        self.graph.nodes.append(node)
        self._trunk.append((site, tensor, outputs[0]))
        self._num_ops += node.num_ops
        if self._num_ops > MAX_NODES:
            raise Mistake("TM1502", f"the model has more than {MAX_NODES:,} ops", site.call.span)
        return Ref(len(self.graph.nodes) - 1, 0)

    def _placed(self, site: Site, mistake: Mistake) -> Mistake:
        """The mistake of a block or op that the spec itself places."""
        finding = mistake.finding
        about = mistake.about
        span = finding.span or site.call.span
        if about is site.call and site.call.span.source.name not in self.plan.own:
            found = Trace([a.value for a in site.call.arguments], [], {"C", "H", "W"})
            best = next((p for p in self._blamed(site, found) if p.own), None)
            if best is not None:
                note = Note(f"asked for in {site.name}", site.call.span)
                finding = replace(finding, notes=(*finding.notes, note))
                span = best.span
        mistake.finding = replace(finding, span=span)
        return mistake

    def _blamed(self, site: Site, found: Trace) -> list[Place]:
        """Values in specs that stand behind a failing line of a site's block, the likeliest first."""
        origins = self.plan.origins
        places = [p for expr in found.arguments for p in origins.places(expr, site.names)]
        if "C" in found.dimensions:
            maker = next(
                (
                    (s, out)
                    for s, given, out in reversed(self._trunk)
                    if "C" in out.letters and _channels(given) != out.C
                ),
                None,
            )
            if maker is not None:
                made, out = maker
                exprs = [a.value for a in made.call.arguments if made.arguments.get(a.name) == out.C]
                places += [p for expr in exprs for p in origins.places(expr, made.names)]
        if found.dimensions & {"H", "W", "N"} and origins.input == self.graph.inputs[0].dims and origins.input_span:
            places.append(Place(origins.input_span, origins.input_span.source.name in self.plan.own))
        return places

    def _with_input(self, finding: Finding) -> Finding:
        """The input size, where the finding is about a size."""
        channels, height, width = self.graph.inputs[0].dims
        note = Note(f"for an input of {channels}x{height}x{width}")
        return replace(finding, notes=(*finding.notes, note)) if finding.id in ("TM1404", "TM1402") else finding


def _channels(tensor: Tensor) -> int | None:
    return tensor.C if "C" in tensor.letters else None


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
    draft = make_draft(document, overrides, findings) if document is not None else None
    name = document.name if document else Path(str(spec)).stem
    return Model(document, draft, findings, name, overrides)
