"""Sizes that are not numbers yet: what the emitted source computes from its constructor's arguments and its input.

A `Formula` is a sum of products with exact coefficients, so that `C / 2 + C / 2` is `C` again; what has no such form
(`dim // 16`) becomes one factor. A `Symbol` is any other expression (a rate, a condition, an entry of a list).
Both carry the value they have in one real instance of the block (`hint`), for choices that formulas cannot make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

__all__ = [
    "Formula",
    "Leaf",
    "Recorder",
    "Symbol",
    "comment",
    "hint_of",
    "is_symbolic",
    "leaves_of",
    "real",
    "rendering",
    "symbol",
]


@dataclass(frozen=True)
class Leaf:
    """A name of the emitted source.

    Args:
        name: as in the constructor (`dim`, `heads`) or in `forward` (`H`).
        role: "argument" of the constructor (in `forward`, `self.name`), "size" known per input, or "loop" variable.
        letter: how shape comments call it.
    """

    name: str
    role: str
    letter: str = ""


@dataclass
class Recorder:
    """What rendered text refers to: constructor arguments, those that `forward` reads from self, sizes of the input."""

    arguments: set[str] = field(default_factory=set)
    stored: set[str] = field(default_factory=set)
    sizes: set[str] = field(default_factory=set)


@dataclass
class _Mode:
    forward: bool = False
    comment: bool = False
    recorder: Recorder = field(default_factory=Recorder)


_mode = _Mode()


@contextmanager
def rendering(*, forward: bool = False, comment: bool = False, recorder: Recorder | None = None) -> Iterator[None]:
    """How `str()` of formulas reads inside: as code of the constructor, of `forward`, or as a shape comment."""
    global _mode
    outer = _mode
    _mode = _Mode(forward, comment, recorder or Recorder())
    try:
        yield
    finally:
        _mode = outer


def _leaf_text(leaf: Leaf) -> str:
    if _mode.comment:
        return leaf.letter or leaf.name
    if leaf.role == "size":
        _mode.recorder.sizes.add(leaf.name)
    elif leaf.role == "argument":
        _mode.recorder.arguments.add(leaf.name)
        if _mode.forward:
            _mode.recorder.stored.add(leaf.name)
            return f"self.{leaf.name}"
    return leaf.name


# Binding strength of Python's operators, for brackets.
LEVEL = {
    "if": 0,
    "or": 1,
    "and": 2,
    "not": 3,
    "compare": 4,
    "+": 5,
    "-": 5,
    "*": 6,
    "/": 6,
    "//": 6,
    "%": 6,
    "sign": 7,
    "**": 8,
}
_ATOM = 9


@dataclass(frozen=True, eq=False)
class Symbol:
    """An expression as a tree: text of the operator, operands, binding strength."""

    template: str
    parts: tuple[Any, ...]
    level: int
    hint: Any = None

    def __str__(self) -> str:
        return self.template.format(*(_operand(part, level) for part, level in self.parts))

    @property
    def key(self) -> tuple:
        return (self.template, tuple((p.key if isinstance(p, Formula | Symbol) else p, n) for p, n in self.parts))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symbol) and self.key == other.key


def real(value: Any) -> Any:
    """A number for places that take fractions: comparisons, roots, arithmetic with tensors."""
    return value.quotient() if isinstance(value, Formula) else value


def symbol(template: str, *parts: Any, level: int = _ATOM, inner: int = 0, hint: Any = None) -> Symbol:
    """An expression from a template with `{}` for each part; parts that bind looser than `inner` get brackets."""
    return Symbol(template, tuple((part, inner) for part in parts), level, hint)


def _operand(part: Any, level: int) -> str:
    if isinstance(part, Leaf):
        return _leaf_text(part)
    if isinstance(part, Formula):
        return f"({part})" if part.level < level else str(part)
    if isinstance(part, Symbol):
        return f"({part})" if part.level < level else str(part)
    if isinstance(part, tuple):
        return "[" + ", ".join(_operand(p, 0) for p in part) + "]"
    return repr(part)


_Monomial = tuple[tuple[Any, int], ...]  # ((factor, power), ...), factors being leaves or symbols


@dataclass(frozen=True, eq=False)
class Formula:
    """A whole number as a sum of products over constructor arguments and input sizes."""

    terms: tuple[tuple[_Monomial, Fraction], ...]
    hint: Any = None

    @staticmethod
    def of(leaf: Leaf | Symbol, hint: Any = None) -> Formula:
        return Formula(((((leaf, 1),), Fraction(1)),), hint)

    @property
    def key(self) -> frozenset:
        return frozenset((frozenset((_key(f), p) for f, p in m), c) for m, c in self.terms)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Formula):
            return self.key == other.key
        return isinstance(other, int | Fraction) and self.key == _constant(other).key

    def __hash__(self) -> int:
        return hash(self.key)

    def _joined(self, other: Any, sign: int) -> Any:
        other = _formula(other)
        terms = dict(_ordered(self.terms))
        for monomial, coefficient in _ordered(other.terms):
            terms[monomial] = terms.get(monomial, Fraction(0)) + sign * coefficient
        hint = _apply(lambda a, b: a + sign * b, self.hint, other.hint)
        return _simplified(Formula(tuple((m, c) for m, c in terms.items() if c), hint))

    def __add__(self, other: Any) -> Any:
        return self._joined(other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._joined(other, -1)

    def __rsub__(self, other: Any) -> Any:
        return _formula(other)._joined(self, -1)

    def __neg__(self) -> Any:
        return self * -1

    def __mul__(self, other: Any) -> Any:
        other = _formula(other)
        terms: dict[_Monomial, Fraction] = {}
        for m, c in self.terms:
            for n, d in other.terms:
                product = _product(m, n)
                terms[product] = terms.get(product, Fraction(0)) + c * d
        hint = _apply(lambda a, b: a * b, self.hint, other.hint)
        return _simplified(Formula(tuple((m, c) for m, c in terms.items() if c), hint))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        other = _formula(other)
        hint = _apply(lambda a, b: Fraction(a) / b, self.hint, other.hint)
        if len(other.terms) == 1:
            ((monomial, coefficient),) = other.terms
            inverse = Formula(((tuple((f, -p) for f, p in monomial), 1 / coefficient),))
            result = self * inverse
            return Formula(result.terms, hint) if isinstance(result, Formula) else result
        return Formula.of(symbol("{} // {}", self, other, level=LEVEL["//"], inner=LEVEL["//"] + 1), hint)

    def __rtruediv__(self, other: Any) -> Any:
        return _formula(other) / self

    def __floordiv__(self, other: Any) -> Any:
        return self._divided(other, "//")

    def __rfloordiv__(self, other: Any) -> Any:
        return _formula(other)._divided(self, "//")

    def __mod__(self, other: Any) -> Any:
        return self._divided(other, "%")

    def __rmod__(self, other: Any) -> Any:
        return _formula(other)._divided(self, "%")

    def _divided(self, other: Any, sign: str) -> Any:
        if isinstance(other, int) and other > 0 and all(c % other == 0 for _, c in self.terms) and self._is_whole():
            return self / other if sign == "//" else 0
        hint = _apply(lambda a, b: a // b if sign == "//" else a % b, self.hint, hint_of(other))
        made = Symbol("{} " + sign + " {}", ((self, LEVEL[sign]), (other, LEVEL[sign] + 1)), LEVEL[sign])
        return Formula.of(made, hint)

    def __pow__(self, power: Any) -> Any:
        if isinstance(power, int) and 0 <= power <= 4:
            result: Any = 1
            for _ in range(power):
                result = self * result
            return result
        return Formula.of(
            Symbol("{} ** {}", ((self, LEVEL["**"] + 1), (power, LEVEL["sign"])), LEVEL["**"]),
            _apply(lambda a, b: a**b, self.hint, hint_of(power)),
        )

    def __rpow__(self, base: Any) -> Any:
        made = Symbol("{} ** {}", ((base, LEVEL["**"] + 1), (self, LEVEL["sign"])), LEVEL["**"])
        return Formula.of(made, _apply(lambda a, b: a**b, hint_of(base), self.hint))

    def quotient(self) -> Any:
        """The exact number, where a fraction may come out: `H / 4` as it stands and not as the whole number below."""
        if self._is_whole():
            return self
        raised, number, below = self._fraction()
        above = Formula(tuple((m, Fraction(c)) for m, c in raised))
        divisor = _simplified(Formula(((tuple(below.items()), Fraction(number)),)))
        return Symbol("{} / {}", ((above, LEVEL["/"]), (divisor, LEVEL["/"] + 1)), LEVEL["/"], self.hint)

    def floor(self) -> Any:
        """The whole number below a quotient such as `H / 4`."""
        return self if self._is_whole() else self._rounded(math.floor, "{} // {}", LEVEL["//"])

    def ceil(self) -> Any:
        """The whole number above a quotient."""
        return self if self._is_whole() else self._rounded(math.ceil, "-(-{} // {})", LEVEL["sign"])

    def _rounded(self, function: Callable[[Any], int], template: str, level: int) -> Formula:
        raised, number, below = self._fraction()
        above = Formula(tuple((m, Fraction(c)) for m, c in raised))
        divisor = _simplified(Formula(((tuple(below.items()), Fraction(number)),)))
        made = Symbol(template, ((above, level), (divisor, LEVEL["//"] + 1)), level)
        return Formula.of(made, None if self.hint is None else function(self.hint))

    def _is_whole(self) -> bool:
        return all(c.denominator == 1 and all(p > 0 for _, p in m) for m, c in self.terms)

    def _fraction(self) -> tuple[list[tuple[_Monomial, int]], int, dict[Any, int]]:
        """Terms over one denominator: a number and the factors that stand below the line."""
        number = math.lcm(*(c.denominator for _, c in self.terms))
        below: dict[Any, int] = {}
        for monomial, _ in self.terms:
            for factor, power in monomial:
                if power < 0:
                    below[factor] = max(below.get(factor, 0), -power)
        raised = [(_product(m, tuple(below.items())), int(c * number)) for m, c in self.terms]
        return raised, number, below

    @property
    def level(self) -> int:
        raised, number, below = self._fraction()
        if number != 1 or below:
            return LEVEL["//"]
        if len(raised) > 1:
            return LEVEL["+"]
        ((monomial, coefficient),) = raised
        if coefficient < 0:
            return LEVEL["sign"]
        factors = sum(power for _, power in monomial) + (coefficient != 1)
        if factors > 1:
            return LEVEL["*"]
        return monomial[0][0].level if monomial and isinstance(monomial[0][0], Symbol) else _ATOM

    def __str__(self) -> str:
        raised, number, below = self._fraction()
        text = ""
        for monomial, coefficient in raised:
            part = _monomial_text(monomial, abs(coefficient), signed=coefficient < 0 and not text)
            text = (
                f"{text} {'-' if coefficient < 0 else '+'} {part}" if text else ("-" if coefficient < 0 else "") + part
            )
        if number == 1 and not below:
            return text or "0"
        if len(raised) > 1:
            text = f"({text})"
        divisors = [str(number)] if number != 1 else []
        divisors += [_operand(f, LEVEL["*"] + 1) for f, p in below.items() for _ in range(p)]
        divisor = " * ".join(divisors)
        sign = "/" if _mode.comment else " // "
        return f"{text}{sign}{divisor if len(divisors) == 1 else f'({divisor})'}"


def _key(factor: Any) -> Any:
    return factor.key if isinstance(factor, Symbol) else factor


def _ordered(terms: tuple[tuple[_Monomial, Fraction], ...]) -> Iterator[tuple[_Monomial, Fraction]]:
    for monomial, coefficient in terms:
        yield _product(monomial, ()), coefficient


def _product(a: _Monomial, b: _Monomial) -> _Monomial:
    powers: dict[Any, int] = {}
    for factor, power in (*a, *b):
        powers[factor] = powers.get(factor, 0) + power
    return tuple(sorted(((f, p) for f, p in powers.items() if p), key=lambda item: str(_key(item[0]))))


def _constant(number: Any) -> Formula:
    return Formula((((), Fraction(number)),) if number else (), number)


def _formula(value: Any) -> Formula:
    if isinstance(value, Formula):
        return value
    if isinstance(value, Symbol):
        return Formula.of(value, value.hint)
    return _constant(value)


def _simplified(formula: Formula) -> Any:
    """A plain number where no name is left."""
    if not formula.terms:
        return 0
    if len(formula.terms) == 1 and not formula.terms[0][0]:
        number = formula.terms[0][1]
        return int(number) if number.denominator == 1 else number
    return formula


def _monomial_text(monomial: _Monomial, coefficient: int, *, signed: bool = False) -> str:
    """A product as source; `signed` where a minus stands directly in front, which binds tighter than `//`."""
    if _mode.comment:
        parts = [_operand(f, _ATOM) for f, p in monomial for _ in range(p)]
        return (str(coefficient) if coefficient != 1 or not parts else "") + "*".join(parts)
    parts = [str(coefficient)] if coefficient != 1 or not monomial else []
    inner = LEVEL["*"] if len(parts) + len(monomial) == 1 and not signed else LEVEL["*"] + 1
    for factor, power in monomial:
        text = _operand(factor, LEVEL["**"] + 1 if power > 1 else inner)
        parts.append(f"{text}**{power}" if power > 1 else text)
    return " * ".join(parts)


def _apply(function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    if a is None or b is None:
        return None
    try:
        return function(a, b)
    except (ArithmeticError, TypeError):
        return None


def hint_of(value: Any) -> Any:
    """The number a value has in one real instance."""
    return value.hint if isinstance(value, Formula | Symbol) else value


def is_symbolic(value: Any) -> bool:
    return isinstance(value, Formula | Symbol) or (isinstance(value, tuple) and any(is_symbolic(v) for v in value))


def leaves_of(value: Any) -> set[Leaf]:
    """Names that a value refers to."""
    if isinstance(value, Leaf):
        return {value}
    if isinstance(value, Formula):
        return {leaf for monomial, _ in value.terms for factor, _ in monomial for leaf in leaves_of(factor)}
    if isinstance(value, Symbol):
        return {leaf for part, _ in value.parts for leaf in leaves_of(part)}
    if isinstance(value, tuple):
        return {leaf for part in value for leaf in leaves_of(part)}
    return set()


def comment(dims: tuple[Any, ...]) -> str:
    """A shape for a comment: `(B, H, W, C/2)`. Heights and widths that take a longer formula become H' and W'."""
    with rendering(comment=True):
        texts = ["B"]
        for position, dim in enumerate(dims):
            text = str(dim).replace(" // ", "//").replace(" * ", "*")
            if text.startswith("(") and text.find(")") == len(text) - 1:
                text = text[1:-1]
            if len(text) > 8 and any(leaf.role == "size" for leaf in leaves_of(dim)):
                text = "HW"[position] + "'" if len(dims) == 3 and position < 2 else "N'"
            texts.append(text)
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"
