"""Exact evaluation of expressions: integers stay integers, `/` must come out whole where a size is asked for.

`Evaluator` knows numbers, words, lists and the built-in functions. The compiler's evaluators add tensors (elaboration)
and formulas (emission) by overriding what they treat differently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Mistake, Note, nearest
from tokenmix.dsl.limits import MAX_INTEGER, MAX_LIST
from tokenmix.dsl.source import Span

__all__ = ["FUNCTIONS", "TYPES", "Evaluator", "RampRate", "Rate", "coerce", "describe", "listed", "names_in"]

# Functions on numbers and lists, with what they take.
FUNCTIONS: dict[str, str] = {
    "abs": "abs(number): its magnitude",
    "ceil": "ceil(number): the next whole number up",
    "floor": "floor(number): the next whole number down",
    "len": "len(list): number of entries",
    "max": "max(a, b, ...) or max(list): the largest",
    "min": "min(a, b, ...) or min(list): the smallest",
    "ramp": "ramp(rate): in a stage's blocks, growing evenly from 0 at the model's first block to `rate` at its last; "
    "ramp(rate, depths, i): the list of those rates for the blocks of stage i",
    "sqrt": "sqrt(number): the square root",
    "sum": "sum(list): the total",
}

TYPES: dict[str, str] = {
    "int": "a whole number",
    "odd": "an odd whole number",
    "float": "a number",
    "rate": "a probability, at least 0 and below 1",
    "bool": "true or false",
    "str": "a text",
}


class RampRate(float):
    """A drop rate: entry `index` of the rates growing evenly from 0 to `top` over all `total` blocks of the model."""

    index: int
    total: int
    top: float

    def __new__(cls, rate: float, index: int, total: int) -> RampRate:
        value = super().__new__(cls, rate * index / (total - 1) if total > 1 else 0.0)
        value.index = index
        value.total = total
        value.top = rate
        return value


@dataclass(frozen=True)
class Rate:
    """What elaboration knows of a probability: whether it is zero.

    Costs do not depend on drop rates, and blocks that differ in nothing else share one graph.
    """

    zero: bool


_SHOWN = 8  # entries of a list that a message shows


def describe(value: Any) -> str:
    """A value in the words of the language, for messages. Long lists and texts are cut."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator} = {float(value):.4g}"
    if isinstance(value, Rate):
        return "0.0" if value.zero else "a rate above 0"
    if isinstance(value, list | tuple):
        more = [f"... ({len(value)} entries)"] if len(value) > _SHOWN + 1 else []
        return "[" + ", ".join([describe(v) for v in (value[:_SHOWN] if more else value)] + more) + "]"
    if isinstance(value, str):
        return f'"{value if len(value) <= 60 else value[:50] + "..."}"'
    return repr(value) if isinstance(value, int | float) else str(value)


def names_in(expr: syntax.Expr | Any) -> set[str]:
    """Names an expression reads."""
    if isinstance(expr, syntax.Name):
        return {expr.name}
    found: set[str] = set()
    if isinstance(expr, syntax.Node):
        for value in vars(expr).values():
            found |= names_in(value)
    elif isinstance(expr, tuple):
        for value in expr:
            found |= names_in(value)
    return found


class Evaluator:
    """Evaluates expressions over an environment of names.

    Args:
        names: what each name stands for.
        scope: how messages call the place, e.g. "block `mlp`".
    """

    def __init__(self, names: Mapping[str, Any], scope: str):
        self.names = names
        self.scope = scope

    def value(self, expr: syntax.Expr) -> Any:
        """The value of an expression. Raises `Mistake`."""
        method = getattr(self, "eval_" + type(expr).__name__.lower())
        return method(expr)

    def eval_literal(self, expr: syntax.Literal) -> Any:
        return expr.value

    def eval_name(self, expr: syntax.Name) -> Any:
        if expr.name not in self.names:
            near = nearest(expr.name, self.names)
            raise Mistake(
                "TM1206",
                f"nothing is called `{expr.name}` in {self.scope}",
                expr.span,
                help=f"did you mean `{near[0]}`?" if near else f"known here: {listed(sorted(self.names)) or 'nothing'}",
            )
        value = self.names[expr.name]
        return self.dimension(expr, value) if expr.dim else value

    def dimension(self, expr: syntax.Name, value: Any) -> Any:
        raise Mistake("TM1301", f"`{expr.name}` is {describe(value)} and no tensor: it has no `.{expr.dim}`", expr.span)

    def eval_listof(self, expr: syntax.ListOf) -> Any:
        values = tuple([self.value(item) for item in expr.items])
        if sum(len(v) if isinstance(v, tuple) else 1 for v in values) > MAX_LIST:
            raise Mistake("TM1302", f"a list has at most {MAX_LIST:,} entries", expr.span)
        if any(isinstance(v, tuple) and any(isinstance(w, tuple) for w in v) for v in values):
            raise Mistake("TM1104", "lists stand in lists, but no deeper", expr.span)
        return values

    def eval_unary(self, expr: syntax.Unary) -> Any:
        operand = self.value(expr.operand)
        if expr.op == "not":
            return not self._truth(operand, expr.operand)
        return self.negate(expr, operand)

    def negate(self, expr: syntax.Unary, operand: Any) -> Any:
        self._number(operand, expr.operand)
        return -operand if expr.op == "-" else operand

    def eval_binary(self, expr: syntax.Binary) -> Any:
        if expr.op in ("and", "or"):
            return self.logic(expr)
        return self.combine(expr, self.value(expr.left), self.value(expr.right))

    def logic(self, expr: syntax.Binary) -> Any:
        left = self._truth(self.value(expr.left), expr.left)
        if left == (expr.op == "or"):
            return left
        return self._truth(self.value(expr.right), expr.right)

    def combine(self, expr: syntax.Binary, left: Any, right: Any) -> Any:
        if expr.op in ("==", "!=", "<", "<=", ">", ">="):
            return self._compare(expr, left, right)
        if isinstance(left, Rate) or isinstance(right, Rate):
            return self._rate(expr, left, right)
        self._number(left, expr.left)
        self._number(right, expr.right)
        try:
            result = _ARITHMETIC[expr.op](left, right, expr)
        except ZeroDivisionError:
            raise self._by_zero(expr) from None
        except OverflowError:
            raise self._too_large(expr) from None
        if isinstance(result, complex):
            raise Mistake("TM1304", "a root of a negative number", expr.span, notes=self.values_of(expr), about=expr)
        return self._bounded(result, expr)

    def _bounded(self, result: Any, expr: syntax.Expr) -> Any:
        if isinstance(result, Fraction):
            if result.denominator == 1:
                result = int(result)
            elif result.denominator > MAX_INTEGER:
                raise self._too_large(expr)
        number = result if isinstance(result, int | float) else float(result) if isinstance(result, Fraction) else 0
        if not abs(number) <= MAX_INTEGER:  # also refuses nan
            raise self._too_large(expr)
        return result

    def _rate(self, expr: syntax.Binary, left: Any, right: Any) -> Rate:
        """Arithmetic with a rate of which only is known whether it is zero."""
        for value, side in ((left, expr.left), (right, expr.right)):
            if not isinstance(value, Rate):
                self._number(value, side)
        if expr.op in ("/", "//", "%") and right in (0, Rate(True)):
            raise self._by_zero(expr)
        return Rate(expr.op == "*" and any(v == Rate(True) or v == 0 for v in (left, right)))

    def _compare(self, expr: syntax.Binary, left: Any, right: Any) -> bool:
        if isinstance(left, Rate) or isinstance(right, Rate):
            rate, other = (left, right) if isinstance(left, Rate) else (right, left)
            if other != 0:
                raise Mistake("TM1301", "a rate can only be compared with 0", expr.span, about=expr)
            left, right = (0 if rate.zero else 1, 0) if isinstance(left, Rate) else (0, 0 if rate.zero else 1)
        if expr.op in ("==", "!="):
            if _sort(left) != _sort(right):
                raise Mistake(
                    "TM1301", f"{describe(left)} and {describe(right)} cannot be compared", expr.span, about=expr
                )
            return (left == right) == (expr.op == "==")
        self._number(left, expr.left)
        self._number(right, expr.right)
        return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[expr.op]

    def eval_conditional(self, expr: syntax.Conditional) -> Any:
        return self.value(expr.then if self._truth(self.value(expr.condition), expr.condition) else expr.otherwise)

    def eval_index(self, expr: syntax.Index) -> Any:
        base, index = self.value(expr.base), self.value(expr.index)
        if not isinstance(base, tuple):
            raise Mistake(
                "TM1301", f"{describe(base)} is not a list, it has no entries", expr.base.span, about=expr.base
            )
        if isinstance(index, bool) or not isinstance(index, int):
            raise Mistake(
                "TM1301", f"an index is a whole number, got {describe(index)}", expr.index.span, about=expr.index
            )
        if not -len(base) <= index < len(base):
            what = f"`{expr.base.name}`" if isinstance(expr.base, syntax.Name) else "the list"
            raise Mistake(
                "TM1302",
                f"{what} has {_entries(len(base))}, there is no entry {index} (the first is 0)",
                expr.span,
                notes=self.values_of(expr),
                about=expr,
            )
        return base[index]

    def eval_call(self, expr: syntax.Call) -> Any:
        if expr.callee not in FUNCTIONS:
            near = nearest(expr.callee, FUNCTIONS)
            raise Mistake(
                "TM1206",
                f"no function is called `{expr.callee}`",
                expr.callee_span,
                help=f"did you mean `{near[0]}`?" if near else f"functions: {', '.join(sorted(FUNCTIONS))}",
            )
        if expr.label or any(a.name for a in expr.tensors + expr.arguments):
            raise Mistake("TM1306", f"`{expr.callee}` takes plain numbers", expr.span, help=FUNCTIONS[expr.callee])
        values = [self.value(a.value) for a in expr.tensors + expr.arguments]
        return self.function(expr, values)

    def function(self, expr: syntax.Call, values: list[Any]) -> Any:
        try:
            result = _FUNCTIONS[expr.callee](*values)
        except (TypeError, ValueError, IndexError, KeyError, OverflowError):
            given = ", ".join(describe(v) for v in values)
            raise Mistake(
                "TM1306", f"`{expr.callee}` cannot take ({given})", expr.span, help=FUNCTIONS[expr.callee], about=expr
            ) from None
        return self._bounded(result, expr)

    def eval_pipe(self, expr: syntax.Pipe) -> Any:
        raise Mistake("TM1301", "a pipe carries tensors; here a number is wanted", expr.span, about=expr)

    def values_of(self, expr: syntax.Expr) -> tuple[Note, ...]:
        """A note naming the value of each plain name in an expression."""
        known = []
        for name in sorted(names_in(expr)):
            value = self.names.get(name)
            if isinstance(value, int | float | Fraction | tuple | str):
                known.append(f"{name} = {describe(value)}")
        return (Note(", ".join(known)),) if known else ()

    def _number(self, value: Any, expr: syntax.Expr) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
            raise Mistake("TM1301", f"a number is wanted here, got {describe(value)}", expr.span, about=expr)

    def _truth(self, value: Any, expr: syntax.Expr) -> bool:
        if not isinstance(value, bool):
            number = isinstance(value, int | float | Fraction | Rate)
            raise Mistake(
                "TM1301",
                f"a condition is wanted here, got {describe(value)}",
                expr.span,
                help="compare it: `== 0`, `> 0`" if number else "",
                about=expr,
            )
        return value

    def _by_zero(self, expr: syntax.Binary) -> Mistake:
        notes = self.values_of(expr.right) if not isinstance(expr.right, syntax.Literal) else ()
        return Mistake("TM1304", f"`{expr.op}` divides by zero", expr.right.span, notes=notes, about=expr.right)

    def _too_large(self, expr: syntax.Expr) -> Mistake:
        return Mistake(
            "TM1305",
            f"the result passes the limit of {MAX_INTEGER:.0e}",
            expr.span,
            notes=self.values_of(expr),
            about=expr,
        )


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names for a help text, the first few of many."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _entries(count: int) -> str:
    return f"{count} entr{'y' if count == 1 else 'ies'}"


def _sort(value: Any) -> str:
    """What can be compared with each other."""
    if isinstance(value, bool):
        return "condition"
    return "number" if isinstance(value, int | float | Fraction) else type(value).__name__


def _power(left: Any, right: Any, expr: syntax.Expr) -> Any:
    if isinstance(right, Fraction):
        right = float(right)
    size = (math.log2(abs(left)) if left else 0.0) * right
    if size > 64 or (size < -64 and not isinstance(left, float)):
        raise OverflowError
    if isinstance(right, int) and right < 0 and not isinstance(left, float):
        return Fraction(left) ** right
    return left**right


def _divide(left: Any, right: Any, expr: syntax.Expr) -> Any:
    if isinstance(left, float) or isinstance(right, float):
        return left / right
    return Fraction(left) / Fraction(right)


_ARITHMETIC = {
    "+": lambda a, b, _: a + b,
    "-": lambda a, b, _: a - b,
    "*": lambda a, b, _: a * b,
    "/": _divide,
    "//": lambda a, b, _: a // b,
    "%": lambda a, b, _: a % b,
    "**": _power,
}


def _stage_ramp(rate: float, depths: tuple[int, ...], stage: int) -> tuple[RampRate, ...]:
    total, first = sum(depths), sum(depths[:stage])
    if total > MAX_LIST or stage < 0:
        raise ValueError
    return tuple(RampRate(rate, first + j, total) for j in range(depths[stage]))


def _flat(values: tuple) -> tuple:
    return values[0] if len(values) == 1 and isinstance(values[0], tuple) else values


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": lambda x: math.ceil(x),
    "floor": lambda x: math.floor(x),
    "len": lambda x: len(x) if isinstance(x, tuple) else _refuse(),
    "max": lambda *x: max(_flat(x)),
    "min": lambda *x: min(_flat(x)),
    "ramp": _stage_ramp,
    "sqrt": lambda x: math.isqrt(x) if isinstance(x, int) and math.isqrt(x) ** 2 == x else math.sqrt(x),
    "sum": lambda x: sum(x),
}


def _refuse() -> Any:
    raise TypeError


def coerce(
    value: Any,
    type_: syntax.TypeRef | None,
    span: Span | None,
    what: str,
    notes: tuple[Note, ...] = (),
    entries: Sequence[Span] = (),
) -> Any:
    """The value as its parameter's type wants it, or `Mistake`.

    Args:
        value: what was given.
        type_: None takes anything.
        span: the place of the value.
        what: how messages call the parameter.
        notes: further places that matter to a mistake.
        entries: places of the entries of a list, where they are known.
    """
    if type_ is None:
        return value
    if type_.many:
        if not isinstance(value, tuple):
            raise Mistake(
                "TM1301",
                f"{what} must be a list, got {describe(value)}",
                span,
                help="write it in brackets: [...]",
                notes=notes,
            )
        one = syntax.TypeRef(type_.span, type_.names)
        places = entries if len(entries) == len(value) else [span] * len(value)
        return tuple(
            [
                coerce(v, one, s, f"entry {i} of {what}", notes)
                for i, (v, s) in enumerate(zip(value, places, strict=True))
            ]
        )
    name = type_.names[0]
    if len(type_.names) == 1 and name not in TYPES:
        return value  # the declaration has a finding
    if len(type_.names) > 1:
        if not isinstance(value, str) or value not in type_.names:
            near = nearest(value, type_.names) if isinstance(value, str) else []
            words = [n for n in type_.names if n]
            raise Mistake(
                "TM1301",
                f"{what} must be {' or '.join(words)}, got {value if isinstance(value, str) else describe(value)}",
                span,
                help=f"did you mean `{near[0]}`?" if near else "",
                notes=notes,
            )
        return value
    if isinstance(value, tuple):
        raise Mistake(
            "TM1301",
            f"{what} must be {TYPES[name]}, got a list: {describe(value)}",
            span,
            help="give one value",
            notes=notes,
        )

    def wrong(help: str = "") -> Mistake:
        return Mistake("TM1301", f"{what} must be {TYPES[name]}, got {describe(value)}", span, help=help, notes=notes)

    if name in ("bool", "str"):
        if not isinstance(value, bool if name == "bool" else str):
            raise wrong("a text stands in double quotes" if name == "str" else "")
        return value
    if name == "rate" and isinstance(value, Rate):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise wrong("write it without quotes" if isinstance(value, str) and re.fullmatch(r"[-+.\d]+", value) else "")
    if name in ("int", "odd"):
        if isinstance(value, Fraction):
            raise Mistake("TM1303", f"{what} must come out whole, got {describe(value)}", span, notes=notes)
        if not isinstance(value, int):
            raise wrong(f"write `{value:.0f}`" if value.is_integer() else "")
        if name == "odd" and value % 2 == 0:
            raise Mistake(
                "TM1302",
                f"{what} must be odd, got {value}",
                span,
                help=f"near values: {value - 1}, {value + 1}",
                notes=notes,
            )
        return value
    if isinstance(value, Fraction):
        value = float(value)
    if name == "rate":
        if not 0 <= value < 1:
            raise Mistake("TM1302", f"{what} must be at least 0 and below 1, got {describe(value)}", span, notes=notes)
        return value if isinstance(value, RampRate) else float(value)
    return value
