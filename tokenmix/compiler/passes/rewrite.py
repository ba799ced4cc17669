"""What passes decide about calls, told by their places, and the definitions as they read then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from tokenmix.blocks.fused import find_fused
from tokenmix.blocks.op import Op
from tokenmix.compiler.bind import hyperparameters, match_arguments
from tokenmix.compiler.definition import Definition
from tokenmix.compiler.library import Library
from tokenmix.compiler.passes.joined_calls import JoinedCalls
from tokenmix.dsl import syntax
from tokenmix.dsl.source import Span

if TYPE_CHECKING:
    from tokenmix.compiler.passes.joins import Join
    from tokenmix.compiler.passes.norms import Fold

__all__ = ["Edits", "RewrittenLibrary"]


@dataclass
class Edits:
    """What becomes of calls, by their places in the text.

    Attributes:
        removed: calls that hand on their first tensor.
        renamed: call -> the op that it calls from now on, with the same arguments.
        settings: call -> hyperparameters set anew; None leaves them at their default.
        biased: calls of layers that have a bias now.
        joined: calls of layers that become one.
        folds, joins: for every flow, what becomes of the weights.
    """

    removed: set[Span] = field(default_factory=set)
    renamed: dict[Span, str] = field(default_factory=dict)
    settings: dict[Span, dict[str, bool | None]] = field(default_factory=dict)
    biased: set[Span] = field(default_factory=set)
    joined: list[JoinedCalls] = field(default_factory=list)
    folds: list[list[Fold]] = field(default_factory=list)
    joins: list[list[Join]] = field(default_factory=list)

    @property
    def calls(self) -> set[Span]:
        joined = {span for calls in self.joined for span in calls.spans}
        return self.removed | self.renamed.keys() | self.settings.keys() | joined

    def set(self, span: Span, **settings: bool | None) -> None:
        self.settings.setdefault(span, {}).update(settings)


class RewrittenLibrary(Library):
    """A library whose blocks are rewritten as they are asked for."""

    def __init__(self, library: Library, edits: Edits):
        super().__init__()
        self.library = library
        self.edits = edits
        self._rewritten: dict[str, Definition | Op | None] = {}

    def find(self, name: str) -> Definition | Op | None:
        if name not in self._rewritten:
            found = find_fused(name) or self.library.find(name)
            if isinstance(found, Definition):
                found = _rewritten(found, self.library, self.edits)
            self._rewritten[name] = found
        return self._rewritten[name]

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


def _rewritten(definition: Definition, library: Library, edits: Edits) -> Definition:
    """A definition with its calls edited. Every call keeps the label it had."""

    joined = [calls for calls in edits.joined if calls.spans[0] in definition.calls]
    parts = {span: name for calls in joined for span, name in zip(calls.spans, calls.names, strict=True)}

    def rewrite(node: Any) -> Any:
        if isinstance(node, tuple):
            return tuple(
                made
                for part in node
                for made in (*(j.statement for j in joined if j.before is part), rewrite(part))
                if made is not None
            )
        if not isinstance(node, syntax.Node) or isinstance(node, syntax.ModuleDecl):
            return node
        if isinstance(node, syntax.Pipe):
            calls = tuple(rewrite(call) for call in node.calls if call.span not in edits.removed)
            source = rewrite(node.source)
            if node.calls[0].span in parts:
                source, calls = calls[0], calls[1:]
            return replace(node, source=source, calls=calls) if calls else source
        if isinstance(node, syntax.Call) and node.span in edits.removed:
            return rewrite(node.tensors[0].value)
        if isinstance(node, syntax.Call) and node.span in parts:
            return syntax.Name(node.span, parts[node.span])
        made = _with_parts(node, rewrite)
        if isinstance(made, syntax.Call):
            made = replace(made, label=definition.labels.get(id(node), made.label))
            if node.span in edits.settings:
                made = _with(made, library, **edits.settings[node.span])
            return replace(made, callee=edits.renamed.get(node.span, made.callee))
        if isinstance(made, syntax.Assign) and len(made.targets) == 1 and made.targets[0] == made.value:
            return None  # `x = x`
        return made

    if edits.calls.isdisjoint(definition.calls):
        return definition
    return Definition(replace(definition.block, body=rewrite(definition.block.body)), shipped=definition.shipped)


def _with_parts(node: syntax.Node, rewrite: Callable[[Any], Any]) -> Any:
    """A node with its parts rewritten."""
    changes = {}
    for part in fields(node):
        value = getattr(node, part.name)
        if isinstance(value, syntax.Node | tuple):
            new = rewrite(value)
            if new is not value:
                changes[part.name] = new
    return replace(node, **changes) if changes else node


def _with(call: syntax.Call, library: Library, **settings: bool | None) -> syntax.Call:
    """A call with hyperparameters set anew; None leaves them at their default."""
    target = library.find(call.callee)
    assert target is not None
    given = hyperparameters(target.signature, call)
    matched, _ = match_arguments(target.signature, given, call)
    kept = [replace(argument, name=name) for name, argument in matched.items() if name not in settings]
    for name, value in settings.items():
        if value is not None:
            kept.append(syntax.Argument(call.span, name, syntax.Literal(call.span, value)))
    tensors = tuple(t for t in call.tensors if t not in given)
    return replace(call, tensors=tensors, arguments=tuple(kept), divided=bool(tensors), bare=False)
