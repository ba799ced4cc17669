"""Blocks with numbers put in: definitions, hyperparameters and input shapes become graphs of primitive ops.

Equal blocks become one shared graph; `body.py` runs through one. Here stand what all of them share: the library, the
stack of blocks inside of blocks, the findings with their places, the limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

from tokenmix.blocks.op import KINDS, Op, Tensor
from tokenmix.compiler.blame import Frame, Place, Trace, fitting_values, reads, trace
from tokenmix.compiler.body import Body, known_rate, short
from tokenmix.compiler.definition import Definition
from tokenmix.compiler.graph import BlockGraph
from tokenmix.compiler.library import Library
from tokenmix.compiler.outcomes import Failed, Refused
from tokenmix.compiler.verify import verify_shapes
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import MAX_FINDINGS, Finding, Mistake, Note
from tokenmix.dsl.limits import MAX_INTEGER, MAX_LOOP, MAX_NESTING, MAX_STEPS
from tokenmix.dsl.source import Span

__all__ = ["Elaborator"]


class Elaborator:
    """Elaborates blocks of one library, each distinct one once.

    Attributes:
        findings: mistakes met so far.
        instances: definition -> every distinct (hyperparameters, input tensors) it was elaborated with.
        branches: id of an `if` -> the arms that were taken.
    """

    def __init__(self, library: Library):
        self.library = library
        self.findings: list[Finding] = []
        self.instances: dict[Definition, list[BlockGraph]] = {}
        self.branches: dict[int, set[bool]] = {}
        self._graphs: dict[tuple, BlockGraph] = {}
        self._failed: dict[tuple, Failed] = {}
        self._stack: list[Frame] = []
        self._steps = 0
        self._noted: set[tuple] = set()
        self._static: set[Span] = set()
        self.muted = 0
        self.site = ""
        self.blamed: Callable[[Trace], list[Place]] = lambda _: []

    def begin(self) -> None:
        """Start over for another model or input: what failed is looked at anew, what succeeded is kept."""
        self.findings = []
        self._failed = {}
        self._noted = set()
        self._static = set()
        self._stack = []
        self._steps = 0
        self.muted = 0

    def at(self, site: str, blamed: Callable[[Trace], list[Place]]) -> None:
        """Say which place of the spec is being elaborated.

        Args:
            site: its path, such as `stages.2.blocks.5`.
            blamed: the values in specs that stand behind a failing line, the likeliest first.
        """
        self.site = site
        self.blamed = blamed

    def call(
        self, call: syntax.Call, arguments: dict[str, Any], inputs: tuple[Tensor, ...]
    ) -> tuple[Op | BlockGraph, tuple[Tensor, ...]]:
        """Apply a block or op to inputs.

        Raises `Failed` where the block has findings, `Mistake` where the call does not fit.
        """
        target = self.library.find(call.callee)
        assert target is not None
        arguments = {
            k: known_rate(v, p) for (k, v), p in zip(arguments.items(), target.signature.parameters, strict=True)
        }
        self._check_inputs(target.signature, inputs, call)
        if isinstance(target, Op):
            try:
                target.check(*inputs, **arguments)
            except Mistake as mistake:
                raise Refused(mistake, call, _outputs(target, inputs, arguments)) from None
            outputs = target.shape(*inputs, **arguments)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            verify_shapes(call.callee, outputs)
            if any(prod(t.dims) > MAX_INTEGER for t in outputs):
                raise Mistake(
                    "TM1305", f"`{call.callee}` gives a value of more than {MAX_INTEGER:.0e} elements", call.callee_span
                )
            return target, outputs
        graph = self._block(target, call, arguments, inputs)
        return graph, graph.outputs

    def _check_inputs(self, signature: syntax.Signature, inputs: tuple[Tensor, ...], call: syntax.Call) -> None:
        many = bool(signature.inputs) and signature.inputs[-1].many
        if len(inputs) < len(signature.inputs) or (len(inputs) > len(signature.inputs) and not many):
            names = ", ".join(i.name for i in signature.inputs)
            plural = "" if len(signature.inputs) == 1 else "s"
            raise Mistake(
                "TM1306",
                f"`{call.callee}` takes {len(signature.inputs)} tensor{plural} ({names}), got {len(inputs)}",
                call.callee_span,
                help="" if self._stack else "what a spec places gets one tensor: the result of what stands before it",
            )
        for i, tensor in enumerate(inputs):
            wanted = signature.inputs[min(i, len(signature.inputs) - 1)]
            if wanted.kinds and tensor.kind not in wanted.kinds and all(k in KINDS for k in wanted.kinds):
                kinds = " or ".join(wanted.kinds)
                raise Mistake(
                    "TM1401",
                    f"`{call.callee}` takes a value of kind {kinds} as `{wanted.name}`, got a {tensor}",
                    call.callee_span,
                    label=f"gets a {tensor.kind}",
                )

    def _block(
        self, definition: Definition, call: syntax.Call, arguments: dict[str, Any], inputs: tuple[Tensor, ...]
    ) -> BlockGraph:
        key = (definition, tuple(arguments.items()), inputs)
        if key in self._graphs:
            return self._graphs[key]
        if key in self._failed:
            raise Failed(self._failed[key].outputs)
        if definition in (d for d, _ in self._stack):  # only by way of shipped blocks: `circles` finds the others
            names = " -> ".join([d.name for d, _ in self._stack] + [definition.name])
            raise Mistake("TM1210", f"block `{definition.name}` contains itself: {names}", call.callee_span)
        if len(self._stack) >= MAX_NESTING:
            raise Mistake("TM1104", f"blocks are nested more than {MAX_NESTING} deep", call.callee_span)
        static = definition.findings(self.library)
        if static:  # sizes can be looked at all the same
            self.findings += static
            self._static |= {f.span for f in static if f.span is not None}
        self._stack.append((definition, call))
        body = Body(self, definition, arguments, inputs)
        body.faulty = bool(static)
        try:
            graph = body.run()
        finally:
            self._stack.pop()
        if graph is None or static:
            failed = Failed(body.outputs)
            if not self.muted:
                self._failed[key] = failed
            raise failed
        self._graphs[key] = graph
        self.instances.setdefault(definition, []).append(graph)
        return graph

    def note(self, mistake: Mistake, statement: syntax.Statement, body: Body) -> None:
        """Record a mistake met inside the blocks on the stack, where it is to be mended.

        Where a requirement fails, or a line of a shipped block, the text is right and the numbers it was given are
        not: the finding points at the number the user wrote, or else at the call, and names the line as a further
        place.
        """
        if self.muted:
            return
        finding = mistake.finding
        about = mistake.about if mistake.about is not None else statement
        reported = about if isinstance(about, syntax.Node) else statement
        inner = finding.span or reported.span
        if inner in self._static:
            return
        outer = next((i for i, (d, _) in enumerate(self._stack) if all(b.shipped for b, _ in self._stack[i:])), None)
        span, notes = inner, list(finding.notes)
        found = trace(self._stack, about)
        if outer is None and not isinstance(statement, syntax.Require):
            set_ = (
                [p for p in self.blamed(replace(found, dimensions=set())) if p.own]
                if isinstance(about, syntax.Expr)
                else []
            )
            notes += [Note(f"`{p.name}` is set" if p.name else "the value is set", p.span) for p in set_[:2]]
        else:
            best = self._at_fault(found, outer)
            span = best or (self._stack[outer][1].span if outer is not None else inner)
            if isinstance(statement, syntax.Require):
                finding = replace(finding, help=self._fitting(about, outer, best, body))
            if span != inner and not isinstance(statement, syntax.Require):
                name = self._stack[-1][0].name
                values = "; ".join(n.message for n in notes if n.span is None)
                notes = [n for n in notes if n.span is not None]
                what = f"block `{name}` asks for `{short(inner.text)}`" + (f" with {values}" if values else "")
                notes.insert(0, Note(what, inner))
        site = self._stack[0][1].span
        if not (site.source is span.source and site.start <= span.start and span.end <= site.end):
            path = " > ".join(f"`{d.name}`" for d, _ in self._stack)
            notes.append(Note(f"in {self.site}, {path}" if self.site else f"in {path}", site))
        notes = [replace(n, span=None) if n.span == span else n for n in notes]
        key = (finding.id, inner, span)
        if (
            key not in self._noted and len(self._noted) < MAX_FINDINGS
        ):  # a loop, or several stages, meet the same line again
            self._noted.add(key)
            self.findings.append(
                replace(finding, span=span, notes=tuple(notes), label=finding.label if span == inner else "")
            )

    def _fitting(self, condition: Any, outer: int | None, best: Span | None, body: Body) -> str:
        """Values that would do, of the name that the blamed value stands behind."""
        names = list({n.name: n for n in reads(condition) if not n.dim}.values())
        names.sort(key=lambda n: best is not None and self._at_fault(trace(self._stack, n), outer) != best)
        return next(filter(None, (fitting_values(condition, body, n.name) for n in names)), "")

    def _at_fault(self, found: Trace, outer: int | None) -> Span | None:
        if found.literals:
            return found.literals[0]
        places = self.blamed(found) if outer in (0, None) or found.arguments else []
        if outer:  # a block of the user stands between: only what it was told to hand on comes from the spec
            places = [p for p in places if p.own and p.name]
        best = next((p for p in places if p.own), places[0] if places else None)
        return best.span if best else None

    def step(self, count: int = 1) -> None:
        """Count work done. Sharing keeps real models far below the limit; loops in loops would not end."""
        self._steps += count
        if self._steps > MAX_STEPS:
            raise Mistake(
                "TM1501",
                f"more than {MAX_STEPS:,} statements run while the model is built",
                help="fewer rounds, or fewer loops in loops",
            )


def _outputs(op: Op, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """What would come out of an op whose check fails, if its shape is beyond doubt."""
    if any(isinstance(v, int) and v > MAX_LOOP for v in arguments.values()):
        return None  # the check may be there to keep a rule from running wild
    try:
        outputs = op.shape(*inputs, **arguments)
    except (Mistake, ArithmeticError):
        return None
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs if outputs and all(isinstance(d, int) and d > 0 for t in outputs for d in t.dims) else None
