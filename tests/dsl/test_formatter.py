"""The formatter changes layout and nothing else: trees, values and comments come back as they were."""

from __future__ import annotations

import dataclasses
import doctest
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenmix.compiler.spec import SPEC_KEYS
from tokenmix.dsl import formatter, syntax
from tokenmix.dsl.diagnostics import FindingsError, Mistake
from tokenmix.dsl.formatter import format_blocks, format_expression, format_loop, format_text
from tokenmix.dsl.parser import parse_blocks, parse_expression, parse_loop
from tokenmix.dsl.source import EmbeddedSource, Source, Span
from tokenmix.dsl.spec_formatter import format_spec
from tokenmix.dsl.yaml_reader import YamlList, YamlMap, YamlNode, read_yaml

ROOT = Path(__file__).parent.parent.parent
FIXTURES = sorted((ROOT / "tests" / "fixtures" / "format").glob("*.in.*"))
SHIPPED = sorted(
    [
        *(ROOT / "tokenmix" / "blocks").glob("*.mix"),
        *(ROOT / "specs").glob("*.yaml"),
        *(ROOT / "specs" / "ablations").glob("*.yaml"),
    ]
)
KEYS = tuple(SPEC_KEYS)

quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def unbared(node: Any) -> Any:
    """A tree in which `gelu` and `gelu()` are the same stage of a pipe."""
    if isinstance(node, syntax.Call):
        node = dataclasses.replace(node, bare=False)
    if isinstance(node, syntax.Node):
        changed = {f.name: unbared(getattr(node, f.name)) for f in dataclasses.fields(node) if f.compare}
        return dataclasses.replace(node, **changed)
    return tuple(map(unbared, node)) if isinstance(node, tuple | list) else node


def expression(text: str) -> syntax.Expr:
    return unbared(parse_expression(Source("", text)))


def blocks(text: str) -> Any:
    found, findings = parse_blocks(Source("a.mix", text))
    assert not findings, findings
    return unbared(found)


def values(node: YamlNode | None, *, parsed: bool = False, top: bool = True) -> Any:
    """What a YAML tree says; with `parsed`, texts that are code stand for their trees."""
    if isinstance(node, YamlMap):
        pairs = [((k.value, k.text), values(v, parsed=parsed, top=False)) for k, v in node.items]
        return {"map": sorted(pairs, key=lambda p: p[0][1]) if top else pairs}
    if isinstance(node, YamlList):
        return [values(item, parsed=parsed, top=False) for item in node.items]
    if node is None:
        return None
    if parsed and isinstance(node.value, str):
        try:
            return expression(node.value)
        except Mistake:
            found, findings = parse_blocks(Source("", node.value))
            return node.value if findings or not found else unbared(found)
    return type(node.value), node.value


def spec_values(text: str, *, parsed: bool = False) -> Any:
    findings: list = []
    root = read_yaml(Source("a.yaml", text), findings)
    assert not findings, findings
    return values(root, parsed=parsed)


def comments(text: str) -> list[str]:
    """Comments of a block file, or of a spec without `#` in its texts."""
    return [c.rstrip() for c in re.findall(r'"[^"\n]*"|(#[^\n]*)', text) if c]


# Files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_file_says_the_same_after_formatting(path: Path) -> None:
    text = path.read_text()
    once = format_text(Source(path.name, text), KEYS)
    assert format_text(Source(path.name, once), KEYS) == once
    if path.suffix == ".mix":
        assert blocks(once) == blocks(text)
        assert comments(once) == comments(text)
    else:
        assert spec_values(once, parsed=True) == spec_values(text, parsed=True)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda p: p.name)
def test_fixture_is_formatted_as_expected(path: Path) -> None:
    text = path.read_text()
    once = format_text(Source(path.name, text), KEYS)
    assert once == path.with_name(path.name.replace(".in.", ".out.")).read_text()
    assert format_text(Source(path.name, once), KEYS) == once
    if path.name.startswith("order"):
        assert Counter(comments(once)) == Counter(comments(text))
    else:
        assert comments(once) == comments(text)
    if path.suffix == ".mix":
        assert blocks(once) == blocks(text)
    else:
        assert spec_values(once, parsed=True) == spec_values(text, parsed=True)


def test_comment_that_holds_a_pipe_stays_a_comment() -> None:
    text = "block b(x):\n    y = x\n    # |> gelu\n    return y\n"
    assert format_blocks(Source("a.mix", text)) == text


# Expressions


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("a-(b-c)", "a - (b - c)"),
        ("(a-b)-c", "a - b - c"),
        ("(a |> f) * b", "(a |> f) * b"),
        ("((a) |> f)", "a |> f"),
        ("(a |> f) |> g", "(a |> f) |> g"),
        ("(a + b) |> f() |> g(  ;)", "a + b |> f |> g(;)"),
        ("2**-1", "2 ** -1"),
        ("C*2 ** i", "C * 2**i"),
        ("a**b**c", "a ** b**c"),
        ("(a**b)**c", "(a**b) ** c"),
        ("(-a)**2 + -a**2", "(-a) ** 2 + -a**2"),
        ("not(a==b)and(not c)", "not a == b and not c"),
        ("(not a) == b", "(not a) == b"),
        ("(a<b)==c", "(a < b) == c"),
        ("a if(b)else(c if d else e)", "a if b else c if d else e"),
        ("(a if b else c) if d else e", "(a if b else c) if d else e"),
        ("(a or b)[(0)]", "(a or b)[0]"),
        ("x.C[0]//1_000", "x.C[0] // 1_000"),
        ("f(a,b;k=1e-5)", "f(a, b; k = 1e-5)"),
        ("f(;a)", "f(; a)"),
        ("f(a;)", "f(a;)"),
        ("f(k=1,a)", "f(a, k = 1)"),
        ("x|>f(k=1,a)", "x |> f(k = 1, a)"),
        ("x|>n:f(y;1)", "x |> n: f(y; 1)"),
        ("f(n:g(x),(m:h(y))|>i)", "f(n: g(x), m: h(y) |> i)"),
        ("[(1),(x|>f),(n:f(x))]", "[1, (x |> f), (n: f(x))]"),
        ('f("a, b")', 'f("a, b")'),
        ("- - a", "--a"),
    ],
)
def test_expression_keeps_the_brackets_it_needs(text: str, canonical: str) -> None:
    assert format_expression(parse_expression(Source("", text))) == canonical
    assert expression(canonical) == expression(text)


def test_specs_write_keywords_without_blanks() -> None:
    expr = parse_expression(Source("", "f(dim = C*2, act = g(k = 1))"))
    assert format_expression(expr, equals="=") == "f(dim=C * 2, act=g(k=1))"


def test_literal_without_text_is_written_out() -> None:
    nowhere = Source("", "").span(0, 0)
    words = [format_expression(syntax.Literal(nowhere, value)) for value in (3, 0.5, True, False, "height")]
    assert words == ["3", "0.5", "true", "false", '"height"']


def test_loop_is_written_without_blanks_around_its_dots() -> None:
    loop = parse_loop(Source("", "i  in 0 .. len( depths )"))
    assert format_loop(loop) == "i in 0..len(depths)"


def test_text_that_does_not_parse_is_a_finding() -> None:
    with pytest.raises(FindingsError, match="cannot stand here"):
        format_text(Source("a.mix", "block b(x):\n    return )\n"), KEYS)
    with pytest.raises(FindingsError, match="well-formed"):
        format_text(Source("a.yaml", "a: {b\n"), KEYS)
    with pytest.raises(FindingsError, match="map of keys"):
        format_text(Source("a.yaml", "- a\n"), KEYS)


def test_mistake_in_definitions_is_underlined_in_the_spec() -> None:
    text = "tokenmix: 1\ndefinitions: |\n  block b(x):\n      return )\n"
    with pytest.raises(FindingsError) as caught:
        format_spec(Source("a.yaml", text), KEYS)
    (finding,) = caught.value.findings
    assert finding.span is not None
    assert (finding.span.position, finding.span.text) == ((4, 14), ")")


def test_block_file_cut_out_of_another_text_is_formatted() -> None:
    outer = Source("a.yaml", "xx block b(x):\n yy   return x\n")
    inner = EmbeddedSource(outer, "block b(x):\n   return x\n", [3, 18])
    assert format_blocks(inner) == "block b(x):\n    return x\n"


def test_nothing_is_formatted_to_nothing() -> None:
    assert format_blocks(Source("a.mix", "\n \n")) == ""
    assert format_blocks(Source("a.mix", "\n# only a comment  ")) == "# only a comment\n"
    assert format_spec(Source("a.yaml", "# only a comment  "), KEYS) == "# only a comment\n"


def test_examples_in_docstrings_run() -> None:
    assert doctest.testmod(formatter).failed == 0


# Generated trees

NOWHERE = Span(Source("", ""), 0, 0)
NAMES = st.sampled_from(["x", "y", "C", "a_b", "iffy", "order", "notx", "e5", "_p", "true_", "C2"])
DEFINED = st.sampled_from(["y", "out", "a_b", "iffy", "order", "x2"])
LABELS = st.sampled_from(["", "", "proj", "n1", "fc_2"])


def node(kind: type, **fields: Any) -> st.SearchStrategy:
    return st.builds(kind, span=st.just(NOWHERE), **fields)


def literal(value: Any, text: str) -> syntax.Literal:
    return syntax.Literal(NOWHERE, value, text)


LITERALS = st.one_of(
    st.integers(0, 10**6).map(lambda n: literal(n, f"{n:_}")),
    st.sampled_from(["0.5", "1e-5", "1.50E+3", "2e3"]).map(lambda t: literal(float(t), t)),
    st.booleans().map(lambda b: literal(b, "true" if b else "false")),
    st.text("ab#(|>, :'é", max_size=5).map(lambda t: literal(t, f'"{t}"')),
)


def call(
    values_: st.SearchStrategy, *, piped: bool = False, labels: st.SearchStrategy[str] = LABELS
) -> st.SearchStrategy:
    plain = node(syntax.Argument, name=st.just(""), value=values_)
    named = node(syntax.Argument, name=st.sampled_from(["k", "bias"]), value=values_)
    any_ = st.lists(st.one_of(plain, named), max_size=3).map(tuple)
    none: st.SearchStrategy[tuple] = st.just(())
    common = {"callee": NAMES, "callee_span": st.just(NOWHERE), "label": labels}
    return st.one_of(
        node(syntax.Call, **common, tensors=any_, arguments=any_, divided=st.just(True)),
        node(
            syntax.Call,
            **common,
            tensors=none if piped else st.lists(plain, max_size=3).map(tuple),
            arguments=any_ if piped else st.lists(named, max_size=2).map(tuple),
        ),
    )


def larger(inner: st.SearchStrategy) -> st.SearchStrategy:
    def pair(operators: str) -> st.SearchStrategy:
        return node(syntax.Binary, op=st.sampled_from(operators.split()), left=inner, right=inner)

    return st.one_of(
        pair("+ - * / // %"),
        pair("**"),
        pair("== != <= >= < > and or"),
        node(syntax.Unary, op=st.sampled_from(["-", "+", "not"]), operand=inner),
        node(syntax.Conditional, then=inner, condition=inner, otherwise=inner),
        node(syntax.Index, base=inner, index=inner),
        node(syntax.ListOf, items=st.lists(inner, max_size=3).map(tuple)),
        call(inner),
        node(syntax.Pipe, source=inner, calls=st.lists(call(inner, piped=True), min_size=1, max_size=3).map(tuple)),
    )


ATOMS = st.one_of(LITERALS, node(syntax.Name, name=NAMES), node(syntax.Name, name=NAMES, dim=st.just("C")))
EXPRESSIONS = st.recursive(ATOMS, larger, max_leaves=8)


@settings(quick, max_examples=200)
@given(EXPRESSIONS)
def test_any_tree_survives_printing(tree: syntax.Expr) -> None:
    text = format_expression(tree)
    again = parse_expression(Source("", text))
    assert unbared(again) == unbared(tree)
    assert format_expression(again) == text
    assert expression(format_expression(tree, equals="=")) == unbared(tree)


def declared(values_: st.SearchStrategy) -> st.SearchStrategy:
    def fixed(call_: syntax.Call) -> syntax.Call:
        if call_.divided:
            return call_
        return dataclasses.replace(call_, tensors=(), arguments=call_.tensors + call_.arguments)

    return call(values_, labels=st.just("")).map(fixed)


def name_of(name: str) -> syntax.Name:
    return syntax.Name(NOWHERE, name)


SIMPLE = st.one_of(
    node(syntax.Assign, targets=st.lists(DEFINED.map(name_of), min_size=1, max_size=2).map(tuple), value=EXPRESSIONS),
    node(syntax.ModuleDecl, name=DEFINED.map(name_of), call=declared(EXPRESSIONS)),
    node(syntax.Require, condition=EXPRESSIONS, message=st.sampled_from(["", "must, hold # so"])),
    node(syntax.Return, values=st.lists(EXPRESSIONS, min_size=1, max_size=2).map(tuple)),
)


def compound(inner: st.SearchStrategy) -> st.SearchStrategy:
    suite = st.lists(inner, min_size=1, max_size=3).map(tuple)
    return st.one_of(
        node(syntax.For, variable=DEFINED.map(name_of), start=EXPRESSIONS, stop=EXPRESSIONS, body=suite),
        node(syntax.If, condition=EXPRESSIONS, then=suite, otherwise=st.one_of(st.just(()), suite)),
    )


STATEMENTS = st.lists(st.recursive(SIMPLE, compound, max_leaves=5), min_size=1, max_size=4).map(tuple)
TYPES = st.one_of(
    st.none(),
    node(syntax.TypeRef, names=st.sampled_from([("int",), ("relative", "none")])),
    node(syntax.TypeRef, names=st.just(("rate",)), many=st.just(True)),
)
SIGNATURES = node(
    syntax.Signature,
    name=DEFINED,
    inputs=st.lists(
        node(syntax.Input, name=DEFINED, kinds=st.sampled_from([(), ("map",), ("map", "tokens")]), many=st.booleans()),
        min_size=1,
        max_size=3,
    ).map(tuple),
    parameters=st.lists(
        node(syntax.Parameter, name=DEFINED, type=TYPES, default=st.one_of(st.none(), ATOMS)), max_size=6
    ).map(tuple),
)
BLOCKS = st.lists(
    node(
        syntax.Block,
        signature=SIGNATURES,
        body=STATEMENTS,
        doc=st.sampled_from([(), ("one line",), ("two", "  lines #")]),
    ),
    max_size=3,
)


class Scribe:
    """Writes trees as untidily as the grammar allows, with numbered comments wherever one may stand."""

    def __init__(self, random: Random):
        self.random = random
        self.count = 0

    def comment(self) -> str:
        self.count += 1
        return self.random.choice(["# {}", "#{}", "## {} ", "# it's \"{}"]).format(self.count)

    def gap(self) -> str:
        """Between two tokens within brackets."""
        n = self.random.randrange(12)
        if n > 1:
            return " " * (n % 3)
        return f" {self.comment()}\n" if n else f"\n  {self.comment()}\n\n "

    def bracketed(self, expr: syntax.Expr) -> str:
        return f"({self.gap()}{self.inner(expr)}{self.gap()})"

    def expr(self, expr: syntax.Expr) -> str:
        if isinstance(expr, syntax.Literal | syntax.Name) or self.random.random() < 0.2:
            return self.bracketed(expr) if isinstance(expr, syntax.Pipe) else self.bracketed_unless_atom(expr)
        return self.bracketed(expr)

    def bracketed_unless_atom(self, expr: syntax.Expr) -> str:
        if isinstance(expr, syntax.Literal | syntax.Name | syntax.ListOf):
            return self.inner(expr)
        return self.bracketed(expr)

    def whole(self, expr: syntax.Expr) -> str:
        """An expression that is a statement's: a pipe may stand without brackets, over several lines."""
        if isinstance(expr, syntax.Pipe) and self.random.random() < 0.7:
            return self.pipe(expr, outside=True)
        return self.expr(expr)

    def inner(self, expr: syntax.Expr) -> str:
        e, g = self.expr, self.gap
        match expr:
            case syntax.Literal():
                return expr.text
            case syntax.Name():
                return f"{expr.name}.{expr.dim}" if expr.dim else expr.name
            case syntax.ListOf():
                return f"[{g()}{f' ,{g()}'.join(e(i) for i in expr.items)}{g()}]"
            case syntax.Unary():
                return f"{expr.op} {e(expr.operand)}"
            case syntax.Binary():
                return f"{e(expr.left)} {expr.op}{g()} {e(expr.right)}"
            case syntax.Conditional():
                return f"{e(expr.then)} if {e(expr.condition)} else {e(expr.otherwise)}"
            case syntax.Index():
                return f"{self.bracketed(expr.base)}[{g()}{e(expr.index)}{g()}]"
            case syntax.Call():
                return self.call(expr)
            case syntax.Pipe():
                return self.pipe(expr)
        raise TypeError(expr)

    def pipe(self, expr: syntax.Pipe, *, outside: bool = False) -> str:
        text = self.bracketed(expr.source)
        for stage in expr.calls:
            break_ = f"  {self.comment()}\n\t {self.comment()}\n\n " if self.random.random() < 0.2 else " "
            text += f"{break_}|>{'' if outside else self.gap()}{self.call(stage)}"
        return text

    def call(self, call_: syntax.Call) -> str:
        def row(arguments: tuple[syntax.Argument, ...]) -> str:
            return f",{self.gap()}".join(
                (f"{a.name}{self.gap()}= " if a.name else "") + self.expr(a.value) for a in arguments
            )

        label = f"{call_.label} : " if call_.label else ""
        before = row(call_.tensors if call_.divided else call_.tensors + call_.arguments)
        after = f";{self.gap()}{row(call_.arguments)}" if call_.divided else ""
        return f"{label}{call_.callee}({before}{after})"

    def file(self, found: list[syntax.Block]) -> str:
        text = ""
        for block in found:
            text += self.random.choice(["", "\n\n", f"{self.comment()}\n\n", f"  ##{self.comment()}\n"])
            text += "".join(f"##{' ' if line else ''}{line}\n" for line in block.doc)
            text += f"block {self.signature(block.signature)}:{self.end()}{self.suite(block.body, ' ')}"
            text += self.random.choice(["", f"\n {self.comment()}\n", f"{self.comment()}\n\n", " \n"])
        return text

    def end(self) -> str:
        return self.random.choice(["\n", " \n", f" {self.comment()}\n", f"\n\n\n   {self.comment()}\n", "\n\n"])

    def signature(self, signature: syntax.Signature) -> str:
        inputs = f" ,{self.gap()}".join(
            i.name + (" ..." if i.many else "") + (f": {'|'.join(i.kinds)}" if i.kinds else "")
            for i in signature.inputs
        )
        parameters = f",{self.gap()}".join(
            p.name + (f" :{p.type}" if p.type else "") + (f"={self.expr(p.default)}" if p.default else "")
            for p in signature.parameters
        )
        return f"{signature.name}({inputs}{f';{self.gap()}{parameters}' if parameters else ''})"

    def suite(self, body: tuple[syntax.Statement, ...], indent: str) -> str:
        return "".join(self.statement(statement, indent) for statement in body)

    def statement(self, s: syntax.Statement, indent: str) -> str:
        deeper = indent + self.random.choice([" ", "  ", "    ", "\t"])
        match s:
            case syntax.Assign():
                text = f"{','.join(t.name for t in s.targets)}={self.whole(s.value)}"
            case syntax.ModuleDecl():
                text = f"module {s.name.name} =  {self.call(s.call)}"
            case syntax.Require():
                text = f"require {self.expr(s.condition)}" + (f' , "{s.message}"' if s.message else "")
            case syntax.Return():
                text = f"return {' , '.join(self.whole(v) for v in s.values)}"
            case syntax.For():
                loop = f"{self.expr(s.start)} .. {self.expr(s.stop)}"
                return f"{indent}for {s.variable.name} in {loop} :{self.end()}{self.suite(s.body, deeper)}"
            case syntax.If():
                return self.branch(s, indent, deeper)
            case _:
                raise TypeError(s)
        return indent + text + self.end()

    def branch(self, s: syntax.If, indent: str, deeper: str, word: str = "if") -> str:
        text = f"{indent}{word} {self.expr(s.condition)}:{self.end()}{self.suite(s.then, deeper)}"
        if len(s.otherwise) == 1 and isinstance(s.otherwise[0], syntax.If) and self.random.random() < 0.5:
            return text + self.branch(s.otherwise[0], indent, deeper, "elif")
        if s.otherwise:
            text += f"{indent}else :{self.end()}{self.suite(s.otherwise, deeper)}"
        return text


@settings(quick, max_examples=25)
@given(BLOCKS, st.randoms(use_true_random=False))
def test_any_block_file_keeps_its_meaning_and_its_comments(found: list[syntax.Block], random: Random) -> None:
    text = Scribe(random).file(found)
    assert blocks(text) == unbared(found)
    once = format_blocks(Source("a.mix", text))
    assert blocks(once) == unbared(found)
    assert comments(once) == comments(text)
    assert format_blocks(Source("a.mix", once)) == once
    assert not re.search(r"[ \t]$|\n\n\n|\A\n", once, re.M)


# Generated YAML


class Dumper(yaml.SafeDumper):
    """Writes every list and map in the style it asks for, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class Flow(list):
    """A list or the items of a map that are written in brackets."""


def _represent_flow(dumper: yaml.SafeDumper, data: Flow) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


Dumper.add_representer(Flow, _represent_flow)
WORDS = st.one_of(
    st.text("abé1.:-#, {}[]'\"|>&*!%@`?~=\\/\t", max_size=8),
    st.sampled_from(["null", "true", "1e3", "0x1f", "1_0", "- a", "a: b", "a #b", "f(x, y)", "...", "---"]),
)
DATA = st.recursive(
    st.one_of(WORDS, st.integers(), st.booleans(), st.none(), st.sampled_from([0.5, 1e-5])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=6).map(Flow),
        st.dictionaries(WORDS, inner, max_size=4),
    ),
    max_leaves=12,
)
SPECS = st.dictionaries(st.sampled_from(["source", "published", "exact", "doc", "other"]), DATA, min_size=1)


def numbered(text: str, random: Random) -> str:
    """YAML with comments between its lines and behind them. No value may go over several lines."""
    rows = []
    for i, row in enumerate(text.splitlines()):
        if random.random() < 0.2:
            rows.append(random.choice(["", " ", "    ", "         "]) + f"# above {i}")
        if random.random() < 0.1:
            rows.append("")
        rows.append(row + (f" # behind {i}" if random.random() < 0.2 else ""))
    return "\n".join([*rows, *random.choice([[], ["# end"], ["", "  # end"]])]) + "\n"


@quick
@given(SPECS, st.sampled_from([None, False, True]), st.randoms(use_true_random=False))
def test_any_spec_keeps_its_values_and_its_comments(data: dict, flow: bool | None, random: Random) -> None:
    text = yaml.dump(data, Dumper=Dumper, width=10**6, allow_unicode=True, sort_keys=False, default_flow_style=flow)
    text = numbered(text, random)
    once = format_spec(Source("a.yaml", text), KEYS)
    assert spec_values(once) == spec_values(text)
    written = r"(# (?:above|behind|end)[ 0-9]*)$"
    assert Counter(re.findall(written, once, re.M)) == Counter(re.findall(written, text, re.M))
    in_order = format_spec(Source("a.yaml", text), tuple(data))
    assert re.findall(written, in_order, re.M) == re.findall(written, text, re.M)
    assert format_spec(Source("a.yaml", once), KEYS) == once


@quick
@given(
    st.dictionaries(
        st.sampled_from(["doc", "name", "other"]), st.text("ab #:\n\t-\\\"'\u2028\x85", max_size=12), min_size=1
    ),
    st.sampled_from([None, "|", ">", '"', "'"]),
)
def test_text_of_several_lines_keeps_its_value(data: dict[str, str], style: str | None) -> None:
    for document in (data, {"source": [data]}):
        text = yaml.dump(document, Dumper=Dumper, default_style=style, allow_unicode=True, width=8)
        once = format_spec(Source("a.yaml", text), KEYS)
        assert spec_values(once) == spec_values(text)
        assert format_spec(Source("a.yaml", once), KEYS) == once
