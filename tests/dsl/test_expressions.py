"""Arithmetic of the language: exact, typed, bounded."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Mistake
from tokenmix.dsl.expressions import FUNCTIONS, Evaluator, RampRate, Rate, coerce, describe, names_in
from tokenmix.dsl.limits import MAX_INTEGER
from tokenmix.dsl.parser import parse_expression, parse_signature
from tokenmix.dsl.source import Source, Span


def value(text: str, **names: Any) -> Any:
    return Evaluator(names, "this test").value(parse_expression(Source("", text)))


def refused(text: str, **names: Any) -> tuple[str, str]:
    """The id of the mistake and the text that it underlines."""
    with pytest.raises(Mistake) as caught:
        value(text, **names)
    span = caught.value.finding.span
    assert span is not None
    return caught.value.finding.id, span.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("2 ** 3 ** 2", 512),
        ("-2 ** 2", -4),
        ("2 ** -1", Fraction(1, 2)),
        ("10 - 4 - 3", 3),
        ("64 / 4 / 2", 8),
        ("7 // 2 * 2", 6),
        ("-7 // 2", -4),
        ("-7 % 3", 2),
        ("- - 3", 3),
        ("+3", 3),
        ("not 1 == 2 and 2 > 1", True),
        ("1 < 2 or 1 / 0 == 1", True),
        ("1 > 2 and 1 / 0 == 1", False),
        ("not (1 < 2)", False),
        ("3 if 1 < 2 else 1 / 0", 3),
        ("1 / 0 if false else 4 if false else 5", 5),
        ("[1, 2, 3][1]", 2),
        ("[1, 2, 3][-1]", 3),
        ("[[1, 2], [3]][0][1]", 2),
        ("max(1, 5, 3)", 5),
        ("min([4, 2])", 2),
        ("sum([1, 2, 3]) + len([])", 6),
        ("ceil(7 / 2) + floor(7 / 2)", 7),
        ("abs(-3)", 3),
        ("sqrt(49)", 7),
        ("sqrt(2) ** 2 > 1.99", True),
        ('"a" == "a"', True),
        ("1_000", 1000),
        ("1e3", 1000.0),
        ("2.5e-1", 0.25),
        ("[1, 2] == [1, 2]", True),
    ],
)
def test_expression_has_its_value(text: str, expected: Any) -> None:
    result = value(text)
    assert result == expected
    assert type(result) is type(expected)


def test_division_comes_out_whole_or_stays_a_fraction() -> None:
    assert value("C / 2", C=64) == 32 and isinstance(value("C / 2", C=64), int)
    assert value("3 * C / 2", C=3) == Fraction(9, 2)
    assert value("C / 3 * 3", C=64) == 64 and isinstance(value("C / 3 * 3", C=64), int)
    assert value("1 / 3 + 1 / 3 + 1 / 3") == 1


def test_large_numbers_stay_exact() -> None:
    assert value("(10 ** 17 + 1) * 9 // 9") == 10**17 + 1
    assert value("(10 ** 17 + 1) / (10 ** 17 + 1)") == 1


@given(st.integers(-(10**8), 10**8), st.integers(-(10**8), 10**8))
def test_arithmetic_is_that_of_whole_numbers(a: int, b: int) -> None:
    assert value("a + b", a=a, b=b) == a + b
    assert value("a - b", a=a, b=b) == a - b
    assert value("a * b", a=a, b=b) == a * b
    assert value("(a < b) == (b > a)", a=a, b=b) is True
    if b:
        assert value("a / b", a=a, b=b) == Fraction(a, b)
        assert value("a // b * b + a % b", a=a, b=b) == a


@pytest.mark.parametrize(
    ("text", "id", "underlined"),
    [
        ("1 + x", "TM1206", "x"),
        ("1 + foo(2)", "TM1206", "foo"),
        ("1 / 0", "TM1304", "0"),
        ("1 // (2 - 2)", "TM1304", "2 - 2"),
        ("1 % 0", "TM1304", "0"),
        ("0 ** -1", "TM1304", "-1"),
        ("(-8) ** 0.5", "TM1304", "(-8) ** 0.5"),
        ("9 ** 9 ** 9", "TM1305", "9 ** 9 ** 9"),
        ("2 ** 60", "TM1305", "2 ** 60"),
        ("10 ** 18 + 1", "TM1305", "10 ** 18 + 1"),
        ("1e18 * 10", "TM1305", "1e18 * 10"),
        ("2 ** -1000", "TM1305", "2 ** -1000"),
        ("sum([10 ** 18, 10 ** 18])", "TM1305", "sum([10 ** 18, 10 ** 18])"),
        ("1 + true", "TM1301", "true"),
        ('1 + "a"', "TM1301", '"a"'),
        ("[1] + 1", "TM1301", "[1]"),
        ("-[1]", "TM1301", "[1]"),
        ("not 1", "TM1301", "1"),
        ("1 and true", "TM1301", "1"),
        ("1 if 0 else 2", "TM1301", "0"),
        ("1 == true", "TM1301", "1 == true"),
        ('1 == "a"', "TM1301", '1 == "a"'),
        ("[1] == 1", "TM1301", "[1] == 1"),
        ('"a" < "b"', "TM1301", '"a"'),
        ("3[0]", "TM1301", "3"),
        ("[1][1.5]", "TM1301", "1.5"),
        ("[1][true]", "TM1301", "true"),
        ("[1, 2][2]", "TM1302", "[1, 2][2]"),
        ("[1, 2][-3]", "TM1302", "[1, 2][-3]"),
        ("[[[1]]]", "TM1104", "[[[1]]]"),
        ("max()", "TM1306", "max()"),
        ("abs(1, 2)", "TM1306", "abs(1, 2)"),
        ("max(1, [2])", "TM1306", "max(1, [2])"),
        ("len(3)", "TM1306", "len(3)"),
        ("sqrt(-1)", "TM1306", "sqrt(-1)"),
        ("max(a = 1)", "TM1306", "max(a = 1)"),
        ("3 |> gelu", "TM1301", "3 |> gelu"),
    ],
)
def test_expression_without_a_value_underlines_the_part_at_fault(text: str, id: str, underlined: str) -> None:
    assert refused(text) == (id, underlined)


def test_number_has_no_dimension() -> None:
    assert refused("a.C + 1", a=3) == ("TM1301", "a.C")


def test_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(Mistake) as caught:
        value("depth", depths=(1,), heads=(1,))
    assert caught.value.finding.help == "did you mean `depths`?"
    with pytest.raises(Mistake) as caught:
        value("zzz", depths=(1,), heads=(1,))
    assert caught.value.finding.help == "known here: depths, heads"


def test_values_stand_beside_a_mistake() -> None:
    with pytest.raises(Mistake) as caught:
        value("heads[i]", heads=(4, 8), i=3)
    assert [n.message for n in caught.value.finding.notes] == ["heads = [4, 8], i = 3"]


def test_ramp_grows_evenly_from_zero_over_all_blocks() -> None:
    depths = (2, 3)
    rates = [r for i in range(2) for r in value("ramp(0.4, depths, i)", depths=depths, i=i)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert [r.index for r in rates] == [0, 1, 2, 3, 4] and all(r.total == 5 for r in rates)
    assert RampRate(0.4, 0, 1) == 0.0
    assert refused("ramp(0.4, depths, 5)", depths=depths)[0] == "TM1306"
    assert refused("ramp(0.4, depths, -1)", depths=depths)[0] == "TM1306"
    assert refused("ramp(0.4, [10 ** 9], 0)")[0] == "TM1306"


def test_of_a_rate_only_being_zero_is_known() -> None:
    assert value("r == 0", r=Rate(True)) is True
    assert value("r > 0", r=Rate(False)) is True
    assert value("0 < r", r=Rate(False)) is True
    assert value("r * 2", r=Rate(True)) == Rate(True)
    assert value("1 - r", r=Rate(True)) == Rate(False)
    assert refused("r == 0.5", r=Rate(False)) == ("TM1301", "r == 0.5")
    assert refused("1 / r", r=Rate(True)) == ("TM1304", "r")
    assert refused('r + "a"', r=Rate(True)) == ("TM1301", '"a"')


# Types


NOWHERE = Span(Source("", ""), 0, 0)


def as_type(type_: str, given_: Any) -> Any:
    return coerce(given_, parse_signature(f"f(x; p: {type_})").parameters[0].type, NOWHERE, "`p`")


@pytest.mark.parametrize(
    ("type_", "given_", "expected"),
    [
        ("int", 3, 3),
        ("odd", 3, 3),
        ("float", 3, 3),
        ("float", Fraction(1, 2), 0.5),
        ("rate", 0, 0.0),
        ("rate", Fraction(1, 4), 0.25),
        ("rate", Rate(False), Rate(False)),
        ("bool", True, True),
        ("str", "a", "a"),
        ("[int]", (1, 2), (1, 2)),
        ("[int]", (), ()),
        ("a | b", "b", "b"),
    ],
)
def test_value_of_its_type_is_taken(type_: str, given_: Any, expected: Any) -> None:
    result = as_type(type_, given_)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize(
    ("type_", "given_", "id", "message", "help"),
    [
        ("int", 4.0, "TM1301", "`p` must be a whole number, got 4.0", "write `4`"),
        ("int", 4.5, "TM1301", "`p` must be a whole number, got 4.5", ""),
        ("int", True, "TM1301", "`p` must be a whole number, got true", ""),
        ("int", "4", "TM1301", '`p` must be a whole number, got "4"', "write it without quotes"),
        ("int", (4,), "TM1301", "`p` must be a whole number, got a list: [4]", "give one value"),
        ("int", Fraction(25, 2), "TM1303", "`p` must come out whole, got 25/2 = 12.5", ""),
        ("odd", 4, "TM1302", "`p` must be odd, got 4", "near values: 3, 5"),
        ("rate", 1, "TM1302", "`p` must be at least 0 and below 1, got 1", ""),
        ("rate", -0.5, "TM1302", "`p` must be at least 0 and below 1, got -0.5", ""),
        ("bool", 1, "TM1301", "`p` must be true or false, got 1", ""),
        ("str", 1, "TM1301", "`p` must be a text, got 1", "a text stands in double quotes"),
        ("[int]", 1, "TM1301", "`p` must be a list, got 1", "write it in brackets: [...]"),
        ("[int]", (1, 2.5), "TM1301", "entry 1 of `p` must be a whole number, got 2.5", ""),
        ("soft | hard", "sotf", "TM1301", "`p` must be soft or hard, got sotf", "did you mean `soft`?"),
        ("soft | hard", 3, "TM1301", "`p` must be soft or hard, got 3", ""),
    ],
)
def test_value_of_another_type_says_what_is_wanted(type_: str, given_: Any, id: str, message: str, help: str) -> None:
    with pytest.raises(Mistake) as caught:
        as_type(type_, given_)
    assert (caught.value.finding.id, caught.value.finding.message, caught.value.finding.help) == (id, message, help)


def test_values_are_shown_in_the_words_of_the_language() -> None:
    shown = [describe(v) for v in (True, None, 3, 2.5, Fraction(1, 3), "a", (1, 2), Rate(True), Rate(False))]
    assert shown == ["true", "nothing", "3", "2.5", "1/3 = 0.3333", '"a"', "[1, 2]", "0.0", "a rate above 0"]
    assert len(describe(tuple(range(10_000)))) < 60
    assert describe(tuple(range(10_000))).endswith("... (10000 entries)]")
    assert len(describe("x" * 10_000)) < 70


def test_names_of_an_expression_are_those_it_reads() -> None:
    assert names_in(parse_expression(Source("", "a + b[i] * max(c, d.C) if e else -f"))) == set("abicdef")


def test_every_function_is_documented_with_a_call_of_it() -> None:
    assert all(text.startswith(f"{name}(") for name, text in FUNCTIONS.items())


TREES: st.SearchStrategy[str] = st.recursive(
    st.one_of(
        st.integers(0, 99).map(str), st.sampled_from(["a", "b", "l", "r", "t", '"w"', "true", "0.5", "[1, a]", "1e17"])
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "==", "<", "and", "or"]), inner).map(
            lambda t: f"({t[0]} {t[1]} {t[2]})"
        ),
        st.tuples(st.sampled_from(["-", "not "]), inner).map(lambda t: f"({t[0]}{t[1]})"),
        st.tuples(inner, inner, inner).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
        st.tuples(inner, inner).map(lambda t: f"({t[0]})[{t[1]}]"),
        st.tuples(st.sampled_from(sorted(FUNCTIONS)), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
        inner.map(lambda t: f"sum({t})"),
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(TREES)
def test_any_expression_has_a_bounded_value_or_a_mistake_with_a_place(text: str) -> None:
    names = {"a": 7, "b": -3, "l": (1, 2, 3), "r": Rate(False), "t": "w"}
    try:
        result = value(text, **names)
    except Mistake as mistake:
        assert mistake.finding.span is not None
        assert isinstance(mistake.about, syntax.Node) or mistake.about is None
    else:
        if isinstance(result, int | float | Fraction):
            assert abs(result) <= MAX_INTEGER
        describe(result)
