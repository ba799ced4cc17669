"""Matching the arguments of a call with the signature of what it calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding, Mistake, Note, nearest
from tokenmix.dsl.expressions import TYPES, Evaluator, coerce

__all__ = ["bind", "default_value", "hyperparameters", "is_word", "match_arguments", "misfit", "takes"]


def takes(signature: syntax.Signature) -> str:
    """The signature in one line, for help texts."""
    inputs = ", ".join(i.name + ("..." if i.many else "") for i in signature.inputs)
    parameters = ", ".join(
        p.name + (f": {p.type}" if p.type else "") + (" = ..." if p.default is not None else "")
        for p in signature.parameters
    )
    return f"{signature.name}({inputs}{'; ' if parameters else ''}{parameters})"


def hyperparameters(signature: syntax.Signature, call: syntax.Call) -> tuple[syntax.Argument, ...]:
    """The arguments of a call that are hyperparameters: all of them where no tensor is taken, as in `parameter(C)`."""
    return call.arguments if signature.inputs or call.divided else call.tensors + call.arguments


def match_arguments(
    signature: syntax.Signature, arguments: tuple[syntax.Argument, ...], call: syntax.Call
) -> tuple[dict[str, syntax.Argument], list[Finding]]:
    """Parameter name -> argument as written, and what does not match. Evaluates nothing."""
    matched: dict[str, syntax.Argument] = {}
    findings = []
    guessed = False
    names = [p.name for p in signature.parameters]
    position = 0
    for argument in arguments:
        name = argument.name
        if not name:
            if position >= len(names):
                findings.append(
                    Finding(
                        "TM1306",
                        f"`{signature.name}` takes {len(names)} hyperparameter{'s' if len(names) != 1 else ''}, "
                        "this is one too many",
                        argument.span,
                        help=takes(signature)
                        + ("; in a pipe, further tensors stand before a `;`" if len(signature.inputs) > 1 else ""),
                    )
                )
                continue
            name = names[position]
            position += 1
        elif name not in names:
            given = [a.name for a in arguments]
            near = [n for n in nearest(name, names) if n not in given and n not in matched]
            findings.append(
                Finding(
                    "TM1204",
                    f"`{signature.name}` has no parameter `{name}`",
                    argument.span.source.span(argument.span.start, argument.span.start + len(name))
                    if argument.span.text.startswith(name)
                    else argument.span,
                    help=f"did you mean `{near[0]}`?" if near else takes(signature),
                )
            )
            if not near:
                guessed = True
                continue
            name = near[0]
        if name in matched:
            first = Note("first", matched[name].span)
            findings.append(
                Finding("TM1208", f"`{name}` is given twice", argument.span, notes=(first,), help=takes(signature))
            )
            continue
        matched[name] = argument
    for parameter in signature.parameters:
        # A name that is none of the others is most likely the missing one, misspelt or called as elsewhere.
        if parameter.default is None and parameter.name not in matched and not guessed:
            findings.append(
                Finding(
                    "TM1205",
                    f"`{signature.name}` needs a value for `{parameter.name}`",
                    call.callee_span,
                    help=takes(signature),
                )
            )
    return matched, findings


def misfit(signature: syntax.Signature, call: syntax.Call) -> bool:
    """Whether the arguments of a call do not match the signature, whatever their values."""
    try:
        _matched(signature, call)
    except Mistake:
        return True
    return False


@lru_cache(maxsize=4096)
def _match(signature: _Identity, call: _Identity) -> dict[str, syntax.Argument]:
    matched, findings = match_arguments(signature.node, hyperparameters(signature.node, call.node), call.node)
    if findings:
        mistake = Mistake(findings[0].id, findings[0].message)
        mistake.finding = findings[0]
        raise mistake
    return matched


class _Identity:
    """A syntax node as a key: the same node, not an equal one. Elaboration meets each call many times."""

    __slots__ = ("node",)

    def __init__(self, node: Any):
        self.node = node

    def __hash__(self) -> int:
        return id(self.node)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.node is other.node


def _matched(signature: syntax.Signature, call: syntax.Call) -> dict[str, syntax.Argument]:
    return _match(_Identity(signature), _Identity(call))


def bind(
    signature: syntax.Signature,
    call: syntax.Call,
    value: Callable[[syntax.Parameter, syntax.Expr], Any],
    default: Callable[[syntax.Parameter], Any],
) -> dict[str, Any]:
    """Parameter name -> value in the order of the signature. Raises `Mistake` for the first thing that does not fit."""
    matched = _matched(signature, call)
    return {p.name: value(p, matched[p.name].value) if p.name in matched else default(p) for p in signature.parameters}


def is_word(parameter: syntax.Parameter, expr: syntax.Expr, known: Any) -> bool:
    """Whether a bare name is meant as one of the words a parameter chooses from: `bias = relative`."""
    return (
        isinstance(expr, syntax.Name)
        and not expr.dim
        and parameter.type is not None
        and not parameter.type.many
        and parameter.type.names[0] not in TYPES
        and expr.name not in known
    )


def default_value(parameter: syntax.Parameter, owner: str) -> Any:
    """The value of a parameter's default, as its type wants it. Raises `Mistake`."""
    known = vars(parameter)  # kept with the parameter: elaboration asks for it at every call
    if "_default_value" not in known:
        assert parameter.default is not None
        if is_word(parameter, parameter.default, {}):
            value: Any = parameter.default.name  # type: ignore[union-attr]
        else:
            value = _Head({}, f"the head of `{owner}`").value(parameter.default)
        what = f"`{parameter.name}` of `{owner}`"
        known["_default_value"] = coerce(value, parameter.type, parameter.default.span, what)
    return known["_default_value"]


class _Head(Evaluator):
    def eval_name(self, expr: syntax.Name) -> Any:
        raise Mistake(
            "TM1206",
            f"a default cannot read `{expr.name}`",
            expr.span,
            help="a default is a number, word, text or list",
        )
