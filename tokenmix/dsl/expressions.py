"""Exact evaluation of expressions: integers stay integers, `/` must come out whole where a size is asked for.

`Evaluator` knows numbers, words, lists and the built-in functions. The compiler's evaluators add tensors (elaboration)
and formulas (emission) by overriding what they treat differently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Mistake, Note, nearest
from tokenmix.dsl.limits import MAX_INTEGER, MAX_LIST
from tokenmix.dsl.source import Span

__all__ = ["FUNCTIONS", "Evaluator", "RampRate", "Rate", "TYPES", "coerce", "describe", "names_in"]

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
    """A drop rate that is entry `index` of the evenly growing rates over all `total` blocks of the model."""

    index: int
    total: int

    def __new__(cls, rate: float, index: int, total: int) -> RampRate:
        value = super().__new__(cls, rate * index / (total - 1) if total > 1 else 0.0)
        value.index = index
        value.total = total
        return value


@dataclass(frozen=True)
class Rate:
    """What elaboration knows of a probability: whether it is zero.

    Costs do not depend on drop rates, and blocks that differ in nothing else share one graph.
    """

    zero: bool


def describe(value: Any) -> str:
    """A value in the words of the language, for messages."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Fraction):
        return f"{value.numerator}/{value.denominator} ({float(value):.4g})"
    if isinstance(value, Rate):
        return "0.0" if value.zero else "a rate above 0"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(describe(v) for v in value) + "]"
    if isinstance(value, str):
        return f'"{value}"'
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
                help=f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(sorted(self.names)) or 'nothing'}",
            )
        value = self.names[expr.name]
        return self.dimension(expr, value) if expr.dim else value

    def dimension(self, expr: syntax.Name, value: Any) -> Any:
        raise Mistake("TM1301", f"`{expr.name}` is no tensor, it has no `.{expr.dim}`", expr.span)

    def eval_listof(self, expr: syntax.ListOf) -> Any:
        if len(expr.items) > MAX_LIST:
            raise Mistake("TM1302", f"a list has at most {MAX_LIST} entries", expr.span)
        return tuple(self.value(item) for item in expr.items)

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
            return Rate(expr.op == "*" and any(v == Rate(True) or v == 0 for v in (left, right)))
        self._number(left, expr.left)
        self._number(right, expr.right)
        try:
            result = _ARITHMETIC[expr.op](left, right, expr)
        except ZeroDivisionError:
            raise Mistake(
                "TM1304", f"`{expr.op}` divides by zero", expr.right.span, notes=self.values_of(expr.right)
            ) from None
        except OverflowError:
            raise self._too_large(expr) from None
        if isinstance(result, Fraction) and result.denominator == 1:
            result = int(result)
        if isinstance(result, complex) or result != result or abs(result) > MAX_INTEGER:
            raise self._too_large(expr)
        return result

    def _compare(self, expr: syntax.Binary, left: Any, right: Any) -> bool:
        if isinstance(left, Rate) or isinstance(right, Rate):
            rate, other = (left, right) if isinstance(left, Rate) else (right, left)
            if other != 0:
                raise Mistake("TM1301", "a rate can only be compared with 0", expr.span)
            left, right = (0 if rate.zero else 1, 0) if isinstance(left, Rate) else (0, 0 if rate.zero else 1)
        if expr.op in ("==", "!="):
            if isinstance(left, str) != isinstance(right, str):
                raise Mistake("TM1301", f"{describe(left)} and {describe(right)} cannot be compared", expr.span)
            return (left == right) == (expr.op == "==")
        self._number(left, expr.left)
        self._number(right, expr.right)
        return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[expr.op]

    def eval_conditional(self, expr: syntax.Conditional) -> Any:
        return self.value(expr.then if self._truth(self.value(expr.condition), expr.condition) else expr.otherwise)

    def eval_index(self, expr: syntax.Index) -> Any:
        base, index = self.value(expr.base), self.value(expr.index)
        if not isinstance(base, tuple):
            raise Mistake("TM1301", f"{describe(base)} is not a list, it has no entries", expr.base.span)
        if isinstance(index, bool) or not isinstance(index, int):
            raise Mistake("TM1301", f"an index is a whole number, got {describe(index)}", expr.index.span)
        if not -len(base) <= index < len(base):
            raise Mistake(
                "TM1302",
                f"the list has {len(base)} entries, there is no entry {index} (the first is 0)",
                expr.span,
                notes=self.values_of(expr),
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
            raise Mistake("TM1306", f"`{expr.callee}` takes plain numbers: {FUNCTIONS[expr.callee]}", expr.span)
        values = [self.value(a.value) for a in expr.tensors + expr.arguments]
        return self.function(expr, values)

    def function(self, expr: syntax.Call, values: list[Any]) -> Any:
        try:
            result = _FUNCTIONS[expr.callee](*values)
        except (TypeError, ValueError, IndexError, KeyError, OverflowError):
            given = ", ".join(describe(v) for v in values)
            raise Mistake(
                "TM1306", f"`{expr.callee}` cannot take ({given})", expr.span, help=FUNCTIONS[expr.callee]
            ) from None
        return int(result) if isinstance(result, Fraction) and result.denominator == 1 else result

    def eval_pipe(self, expr: syntax.Pipe) -> Any:
        raise Mistake("TM1301", "a pipe carries tensors; here a number is wanted", expr.span)

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
            raise Mistake("TM1301", f"a number is wanted here, got {describe(value)}", expr.span)

    def _truth(self, value: Any, expr: syntax.Expr) -> bool:
        if not isinstance(value, bool):
            raise Mistake(
                "TM1301",
                f"a condition is wanted here, got {describe(value)}",
                expr.span,
                help="compare it: `== 0`, `> 0`",
            )
        return value

    def _too_large(self, expr: syntax.Expr) -> Mistake:
        return Mistake("TM1305", f"the result passes the limit of {MAX_INTEGER:.0e}", expr.span)


def _power(left: Any, right: Any, expr: syntax.Expr) -> Any:
    if isinstance(right, Fraction):
        right = float(right)
    size = math.log2(abs(left)) if left else 0.0
    if abs(size * right) > 64:
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


_FUNCTIONS = {
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


def coerce(value: Any, type_: syntax.TypeRef | None, span: Span | None, what: str, notes: tuple[Note, ...] = ()) -> Any:
    """The value as its parameter's type wants it, or `Mistake`. `what` names the parameter in messages."""
    if type_ is None:
        return value
    if type_.many:
        if not isinstance(value, tuple):
            raise Mistake("TM1301", f"{what} is a list, got {describe(value)}", span, help="write it in brackets: [...]")
        one = syntax.TypeRef(type_.span, type_.names)
        return tuple(coerce(v, one, span, f"entry {i} of {what}", notes) for i, v in enumerate(value))
    name = type_.names[0]
    if len(type_.names) > 1 or name not in TYPES:
        if value not in type_.names:
            near = nearest(str(value), type_.names)
            choice = " or ".join(type_.names)
            raise Mistake(
                "TM1301",
                f"{what} is {choice}, got {describe(value)}",
                span,
                help=f"did you mean `{near[0]}`?" if near else "",
            )
        return value
    wrong = Mistake("TM1301", f"{what} is {TYPES[name]}, got {describe(value)}", span, notes=notes)
    if name in ("bool", "str"):
        if not isinstance(value, bool if name == "bool" else str):
            raise wrong
        return value
    if name == "rate" and isinstance(value, Rate):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
        raise wrong
    if name in ("int", "odd"):
        if isinstance(value, Fraction):
            raise Mistake("TM1303", f"{what} must come out whole, got {describe(value)}", span, notes=notes)
        if not isinstance(value, int):
            raise wrong
        if name == "odd" and value % 2 == 0:
            raise Mistake(
                "TM1302", f"{what} is odd, got {value}", span, help=f"near values: {value - 1}, {value + 1}", notes=notes
            )
        return value
    if isinstance(value, Fraction):
        value = float(value)
    if name == "rate":
        if not 0 <= value < 1:
            raise Mistake("TM1302", f"{what} is at least 0 and below 1, got {value}", span, notes=notes)
        return value if isinstance(value, RampRate) else float(value)
    return value
