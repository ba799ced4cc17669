"""Rewrites of block definitions for inference, told apart from the weights they ask to change.

A pass reads a definition and gives another one with the same result in evaluation mode, and a `Fold` for every pair of
layers whose weights become one. `runtime/inference.py` carries the folds out on the weights of a trained module. The
folded definitions go through the same elaboration and emission as any other: what is folded is seen in the source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tokenmix.blocks.op import Op
from tokenmix.compiler.bind import hyperparameters, match_arguments
from tokenmix.compiler.definition import Definition
from tokenmix.compiler.library import Library
from tokenmix.compiler.model import Model
from tokenmix.dsl import syntax
from tokenmix.dsl.source import Span

__all__ = ["Fold", "fold_norms", "inference_model"]


@dataclass(frozen=True)
class Fold:
    """Two neighbouring layers of a block whose weights become those of one.

    Attributes:
        norm: label of the norm. A batch norm is gone, a layer norm stays without scale and shift.
        layer: label of the layer that takes its scale and shift in.
        behind: whether the norm stood behind the layer, else in front of it.
        place: the call of the norm, since arms of an `if` may share labels.
    """

    norm: str
    layer: str
    behind: bool
    place: Span | None = field(default=None, compare=False)


# Layers that a per-channel scale and shift behind them can be folded into, and those that take one from in front.
_BEHIND = frozenset(["conv", "dwconv", "pointwise", "linear", "dwconv_transpose"])
_FRONT = frozenset(["conv", "pointwise", "linear"])


def fold_norms(definition: Definition, library: Library) -> tuple[Definition, tuple[Fold, ...]]:
    """Fold the norms of a block that stand beside a layer in a pipe.

    Behind a convolution or linear layer a batch norm is folded always. In front of one the scale and shift of a norm
    are folded where every input position counts: in front of a linear layer or 1x1 convolution, and of a convolution
    without padding. (Zeros of a padding come after the shift and would be shifted too.)
    """
    folds: list[Fold] = []

    def labelled(call: syntax.Call) -> syntax.Call:
        return replace(call, label=definition.labels.get(id(call), call.label))

    def rewrite(node: Any) -> Any:
        if isinstance(node, syntax.Pipe):
            node = _folded_pipe(node, definition, library, folds)
        if isinstance(node, syntax.ModuleDecl):
            return node  # used several times: its neighbours differ
        return _rebuilt(node, rewrite, labelled)

    body = tuple(rewrite(statement) for statement in definition.block.body)
    if not folds:
        return definition, ()
    return Definition(replace(definition.block, body=body), shipped=definition.shipped), tuple(folds)


def _rebuilt(node: Any, rewrite: Callable[[Any], Any], labelled: Callable[[syntax.Call], syntax.Call]) -> Any:
    """A node with its parts rewritten and every call under the label it had."""
    if isinstance(node, tuple):
        return tuple(rewrite(part) if isinstance(part, syntax.Node) else part for part in node)
    if not isinstance(node, syntax.Node):
        return node
    changes = {}
    for part in fields(node):
        value = getattr(node, part.name)
        if isinstance(value, syntax.Node):
            changes[part.name] = rewrite(value)
        elif isinstance(value, tuple) and any(isinstance(v, syntax.Node) for v in value):
            changes[part.name] = tuple(rewrite(v) for v in value)
    made: Any = replace(node, **changes) if changes else node
    return replace(made, label=labelled(node).label) if isinstance(node, syntax.Call) else made


def _folded_pipe(
    pipe: syntax.Pipe, definition: Definition, library: Library, folds: list[Fold]
) -> syntax.Pipe | syntax.Expr:
    def op_of(call: syntax.Call) -> str:
        target = library.find(call.callee)
        return target.name if isinstance(target, Op) and call.callee not in definition.modules else ""

    def named(call: syntax.Call) -> syntax.Call:
        return replace(call, label=definition.labels[id(call)]) if id(call) in definition.labels else call

    begins = isinstance(pipe.source, syntax.Call)
    chain = [named(c) for c in ((pipe.source,) if begins else ()) + pipe.calls if isinstance(c, syntax.Call)]
    i = 0
    while i + 1 < len(chain):
        first, second = chain[i], chain[i + 1]
        a, b = op_of(first), op_of(second)
        if a in _BEHIND and b == "batch_norm":
            folds.append(Fold(second.label, first.label, behind=True, place=second.span))
            chain[i : i + 2] = [_with(first, library, bias=None)]
        elif _scales(first, a, library) and b in _FRONT and _reads_all(second, b, library) and (i or not begins):
            folds.append(Fold(first.label, second.label, behind=False, place=first.span))
            norm = [_with(first, library, affine=False)] if a == "layer_norm" else []
            chain[i : i + 2] = [*norm, _with(second, library, bias=None)]
            i += len(norm)
        else:
            i += 1
    source, calls = (chain[0], chain[1:]) if begins else (pipe.source, chain)
    return replace(pipe, source=source, calls=tuple(calls)) if calls else source


def _scales(call: syntax.Call, op: str, library: Library) -> bool:
    """Whether a layer is a norm with a scale and a shift of its own."""
    if op != "layer_norm":
        return op == "batch_norm"
    target = library.find(call.callee)
    assert target is not None
    return "affine" not in match_arguments(target.signature, hyperparameters(target.signature, call), call)[0]


def _reads_all(call: syntax.Call, op: str, library: Library) -> bool:
    """Whether a layer sees no padding and every input channel."""
    if op != "conv":
        return True
    target = library.find(call.callee)
    assert target is not None
    matched, _ = match_arguments(target.signature, hyperparameters(target.signature, call), call)
    padding = matched.get("padding")
    unpadded = padding is not None and isinstance(padding.value, syntax.Literal) and padding.value.value == 0
    return unpadded and "groups" not in matched


def _with(call: syntax.Call, library: Library, **settings: bool | None) -> syntax.Call:
    """A call with hyperparameters set anew; None leaves them at their default."""
    target = library.find(call.callee)
    assert target is not None
    matched, _ = match_arguments(target.signature, hyperparameters(target.signature, call), call)
    kept = [replace(argument, name=name) for name, argument in matched.items() if name not in settings]
    for name, value in settings.items():
        if value is not None:
            kept.append(syntax.Argument(call.span, name, syntax.Literal(call.span, value)))
    tensors = call.tensors if target.signature.inputs and call.divided else ()
    if not call.divided and call.tensors and call.tensors[0] not in hyperparameters(target.signature, call):
        tensors = call.tensors
    return replace(call, tensors=tensors, arguments=tuple(kept), divided=bool(tensors), bare=False)


class _FoldedLibrary(Library):
    """A library whose blocks are folded as they are asked for."""

    def __init__(self, library: Library):
        super().__init__()
        self.library = library
        self.folds: dict[str, tuple[Fold, ...]] = {}
        self._folded: dict[str, Definition | Op | None] = {}

    def find(self, name: str) -> Definition | Op | None:
        if name not in self._folded:
            found = self.library.find(name)
            if isinstance(found, Definition):
                found, self.folds[name] = fold_norms(found, self.library)
            self._folded[name] = found
        return self._folded[name]

    @property
    def plain(self) -> bool:
        return False

    def hidden(self, name: str) -> Definition | Op | None:
        return self.library.hidden(name)

    def may_hold(self, name: str) -> bool:
        return self.library.may_hold(name)

    def own(self) -> list[Definition]:
        return self.library.own()

    def names(self) -> list[str]:
        return self.library.names()


def inference_model(model: Model) -> tuple[Model, dict[str, tuple[Fold, ...]]]:
    """A model without findings as it runs in inference, and the folds of every block by its name."""
    assert model.plan is not None and model.spec is not None
    library = _FoldedLibrary(model.plan.library)
    folded = Model(model.spec, replace(model.plan, library=library), [], model.name, model.overrides)
    folded.elaborate()
    return folded, library.folds
