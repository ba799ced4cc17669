"""Specs that would take the machine down: each is answered with a finding, at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenmix.compiler.model import Model, load
from tokenmix.dsl.diagnostics import CATALOGUE, render

HEAD = "tokenmix: 1\nname: hostile\n"
STAGE = "stages: [{blocks: f}]\n"


def spec(**keys: str) -> str:
    """A spec with the given top-level keys, texts as they stand."""
    return HEAD + "".join(f"{key}: {value}\n" for key, value in keys.items())


def blocks(text: str, block: str = "f") -> str:
    """A spec whose one stage is a block, with the definitions indented below it."""
    indented = "".join(f"  {line}\n" for line in text.strip("\n").split("\n"))
    return f"{HEAD}stages: [{{blocks: {block}}}]\ndefinitions: |\n{indented}"


def answered(model: Callable[[], Model], *ids: str) -> str:
    """Load, look for findings, render them; the text. With a place, and with one of the ids."""
    findings = model().findings
    text = render(findings)
    assert findings, "nothing found"
    assert {f.id for f in findings} <= set(ids), text[:2000]
    assert all(f.id in CATALOGUE and f.span is not None for f in findings)
    assert len(text) < 60_000
    assert text.isprintable() or {c for c in text if not c.isprintable()} == {"\n"}
    return text


def doubling(levels: int) -> str:
    chain = "".join(f"\nblock f{i}(x):\n    return x |> f{i - 1} |> f{i - 1}\n" for i in range(1, levels))
    return f"block f0(x):\n    return x |> gelu\n{chain}\nblock f(x):\n    return x |> f{levels - 1}"


def nested_ifs(depth: int) -> str:
    heads = "".join(f"{'  ' * i}if 1 < 2:\n" for i in range(1, depth))
    return f"block f(x):\n{heads}{'  ' * depth}x = x |> gelu\n  return x"


def nested_fors(depth: int, rounds: int) -> str:
    heads = "".join(f"{'  ' * i}for j{i} in 0..{rounds}:\n" for i in range(1, depth + 1))
    return f"block f(x):\n{heads}{'  ' * (depth + 1)}x = x |> gelu\n  return x"


def chain_of_blocks(length: int, body: str = "x |> {}") -> str:
    links = "".join(f"block f{i}(x):\n    return {body.format(f'f{i + 1}')}\n\n" for i in range(length))
    return f"block f(x):\n    return x |> f0\n\n{links}block f{length}(x):\n    return x |> gelu"


def bomb(levels: int, width: int) -> str:
    lines = [f"  a0: &a0 [{', '.join(['0'] * width)}]"]
    lines += [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return f"{HEAD}parameters:\n" + "\n".join(lines) + "\n"


IN_SPECS = {
    "power": (spec(stages="[{blocks: mlp, repeat: 9**9**9}]"), "TM1305"),
    "power of powers in a parameter": (
        spec(parameters="{n: 9**9**9**9}", stages="[{blocks: mlp, repeat: n}]"),
        "TM1305",
    ),
    "negative power": (spec(stages='[{blocks: "mlp(expand=2**-99999999999)"}]'), "TM1305"),
    "long sum": (spec(stages=f"[{{blocks: mlp, repeat: {'+'.join('1' * 20_000)}}}]"), "TM1004"),
    "deep sum": (spec(stages=f"[{{blocks: mlp, repeat: {'+'.join('1' * 1_500)}}}]"), "TM1104"),
    "minus signs": (spec(stages=f"[{{blocks: mlp, repeat: {'-' * 3_000}1}}]"), "TM1104"),
    "plus and minus signs": (spec(stages=f"[{{blocks: mlp, repeat: 1{'+-' * 1_500}1}}]"), "TM1104"),
    "not": (spec(stages=f"[{{blocks: mlp, repeat: {'not ' * 900}1}}]"), "TM1104"),
    "powers": (spec(stages=f"[{{blocks: mlp, repeat: {'2**' * 900}1}}]"), "TM1104"),
    "brackets": (spec(stages=f"[{{blocks: mlp, repeat: {'(' * 1_000}1{')' * 1_000}}}]"), "TM1104"),
    "square brackets": (spec(stages=f"[{{blocks: mlp, repeat: '{'[' * 1_000}1{']' * 1_000}'}}]"), "TM1104"),
    "indices": (spec(parameters="{a: [1]}", stages=f"[{{blocks: mlp, repeat: 'a{'[0]' * 900}'}}]"), "TM1104"),
    "conditionals": (spec(stages=f"[{{blocks: mlp, repeat: {'1 if 1 < 2 else ' * 200}1}}]"), "TM1104"),
    "functions in functions": (spec(stages=f"[{{blocks: mlp, repeat: {'abs(' * 500}1{')' * 500}}}]"), "TM1104"),
    "YAML nesting": (spec(stages="[" * 10_000 + "]" * 10_000), "TM1104"),
    "YAML nesting of maps": (spec(stages="{a: " * 10_000 + "1" + "}" * 10_000), "TM1104"),
    "YAML nesting, never closed": (spec(stages="[" * 10_000), "TM1104"),
    "YAML nesting by indentation": (HEAD + "".join(" " * i + "a:\n" for i in range(300)), "TM1104"),
    "YAML nesting of list signs": (HEAD + "doc:\n  " + "- " * 5_000 + "1\n", "TM1104"),
    "alias bomb": (bomb(9, 9), "TM1103"),
    "wide alias bomb": (bomb(2, 1_000), "TM1103"),
    "many aliases": (HEAD + "parameters:\n  a: &a 1\n  b: [" + "*a, " * 2_000 + "*a]\n", "TM1103"),
    "alias of itself": (HEAD + "parameters: &p {a: *p}\n", "TM1105"),
    "alias of an outer list": (HEAD + "parameters:\n  a: &a [1, [2, *a]]\n", "TM1105"),
    "list of a million numbers": (spec(parameters=f"{{a: [{'1,' * 50_000} 1]}}"), "TM1103"),
    "thousands of keys": (HEAD + "".join(f"key{i}: 1\n" for i in range(8_000)), "TM1103"),
    "repeat": (spec(stages="[{blocks: mlp, repeat: 10**9}]"), "TM1501"),
    "stages": (spec(stages="{for: i in 0..10**9, blocks: mlp}"), "TM1501"),
    "stages of many blocks": (spec(stages="{for: i in 0..1000, blocks: mlp, repeat: 10000}"), "TM1501"),
    "a number with a million digits": (spec(stages=f"[{{blocks: mlp, repeat: {'9' * 100_000}}}]"), "TM1004"),
    "a number with forty digits": (spec(stages=f"[{{blocks: mlp, repeat: {'9' * 40}}}]"), "TM1305"),
    "an endless float": (spec(parameters="{p: 1e999}", stages="[{blocks: mlp, repeat: p}]"), "TM1305"),
    "a huge name": (spec(stages=f"[{{blocks: {'m' * 3_000}}}]"), "TM1203"),
    "a huge key": (HEAD + f"{'k' * 900}: 1\n" + STAGE.replace("f}", "mlp}"), "TM1201"),
    "a huge name of a model": (f"tokenmix: 1\nname: {'n' * 100_000} !\n{STAGE.replace('f}', 'mlp}')}", "TM1211"),
    "a huge text": (spec(stages=f'[{{blocks: "mlp(expand=\'{"x" * 3_000}\')"}}]'), "TM1106"),
    "a thousand exact figures": (
        spec(stages="[{blocks: mlp}]", exact="[" + "{input: [3, 8, 8], params: 1}, " * 200 + "]"),
        "TM1302",
    ),
    "a wide image": (spec(stages="[{blocks: mlp}]", input="[3, 1000000, 1000000]"), "TM1302"),
    "a deep image": (spec(stages="[{blocks: mlp}]", input="[9999999999, 8, 8]"), "TM1302"),
    "lists in lists": (
        spec(parameters="{a: [[[1]]], b: [[[a, a], a], a]}", stages="[{blocks: mlp, repeat: b}]"),
        "TM1301 TM1207",
    ),
    "an index past the end": (spec(parameters="{a: [1]}", stages="[{blocks: mlp, repeat: 'a[99]'}]"), "TM1302"),
    "a ramp over everything": (
        spec(parameters="{d: [999999999]}", stages="[{blocks: 'mlp(expand=ramp(0.5, d, 0))'}]"),
        "TM1306",
    ),
}  # fmt: skip

IN_BLOCKS = {
    "loop": ("block f(x):\n    for j in 0..10**9:\n        x = x |> gelu\n    return x", "TM1501"),
    "loops in loops": (nested_fors(2, 9_999), "TM1501"),
    "many loops in loops": (nested_fors(30, 10), "TM1501"),
    "empty rounds": (
        "block f(x):\n    a = 0\n" + "    for j in 0..9999:\n        a = j\n" * 40 + "    return x * a",
        "TM1501",
    ),
    "a loop of long lines": (
        f"block f(x):\n    for j in 0..9999:\n        a = sum([{'1, ' * 2_000} 1])\n    return x * a",
        "TM1501",
    ),
    "ops by doubling": (doubling(36), "TM1502"),
    "ops by a factor of twenty": (
        doubling(6).replace("|> f4 |> f4", "|> f4" * 2_000).replace("|> f3 |> f3", "|> f3" * 2_000),
        "TM1502",
    ),
    "ops in a loop": (
        "block f(x):\n    for j in 0..9999:\n        x = x" + " |> gelu" * 200 + "\n    return x",
        "TM1501",
    ),
    "a long pipe": (f"block f(x):\n    return x{' |> gelu' * 15_000}", "TM1004 TM1501"),
    "blocks in blocks": (chain_of_blocks(200), "TM1104"),
    "blocks in sums in blocks": (chain_of_blocks(38, "(x |> {})" + " + x" * 150), "TM1104"),
    "nested ifs": (nested_ifs(300), "TM1104"),
    "nested fors": (nested_fors(300, 1), "TM1104"),
    "many elifs": (
        "block f(x):\n    if 1 > 2:\n        x = x\n" + "    elif 1 > 2:\n        x = x\n" * 900 + "    return x",
        "TM1104",
    ),
    "long sum": (f"block f(x):\n    return x{' + x' * 5_000}", "TM1104"),
    "very long sum": (f"block f(x):\n    return x{' + x' * 20_000}", "TM1004"),
    "minus signs": (f"block f(x):\n    return {'- ' * 5_000}x", "TM1104"),
    "pipes in brackets": (f"block f(x):\n    return {'(' * 200}x{' |> gelu)' * 200}", "TM1104"),
    "labels in brackets": (f"block f(x):\n    return {'gelu(' * 200}x{')' * 200}", "TM1104"),
    "a growing number": (
        "block f(x):\n    a = 3\n    for j in 0..9999:\n        a = a * a\n    return x * a",
        "TM1305",
    ),
    "a growing fraction": (
        "block f(x):\n    a = 1\n    for j in 0..9999:\n        a = a / 3 + 1 / 7\n    return x * a",
        "TM1305",
    ),
    "a growing list": (
        "block f(x):\n    a = [1]\n    for j in 0..99:\n        a = [a, a]\n    return x |> linear(len(a))",
        "TM1104",
    ),
    "a growing sum": ("block f(x):\n    a = 1.5\n    for j in 0..9999:\n        a = a + a\n    return x * a", "TM1305"),
    "a growing map": (
        "block f(x):\n    for j in 0..9999:\n        x = concat(x, x)\n    return x |> linear(C)",
        "TM1305 TM1501 TM1502",
    ),
    "a huge split": ("block f(x):\n    a = x |> linear(10**9) |> split(10**9)\n    return x", "TM1207 TM1403"),
    "a huge name": (f"block f(x):\n    {'y' * 50_000} = x |> gelu\n    return x", "TM1207"),
    "a huge comment": (f"block f(x):\n    # {'c' * 50_000}\n    return y", "TM1206"),
    "empty lines before a pipe": (f"block f(x):\n    return x{chr(10) * 60_000}    |> gellu", "TM1203"),
    "blanks": (f"block f(x):\n    return x{' ' * 60_000}|> gellu", "TM1203"),
    "thousands of mistakes": (
        "block f(x):\n" + "".join(f"    a{i} = x |> no_such_op\n" for i in range(4_000)) + "    return x",
        "TM1203",
    ),
    "thousands of unknown names": (
        "block f(x):\n" + "".join(f"    x = x + nme{i}\n" for i in range(4_000)) + "    return x",
        "TM1206",
    ),
    "thousands of wrong blocks": (
        "".join(f"block g{i}(x):\n    return y{i}\n\n" for i in range(3_000)) + "block f(x):\n    return x",
        "TM1206",
    ),
    "thousands of blocks": (
        "".join(f"block f{i}(x):\n    return y\n\n" for i in range(6_000)) + "block f(x):\n    return x",
        "TM1004",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_SPECS)
def test_spec_without_end_is_answered_at_once(name: str, tmp_path: Path) -> None:
    text, ids = IN_SPECS[name]
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    answered(lambda: load(path), *ids.split())


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_block_without_end_is_answered_at_once(name: str, tmp_path: Path) -> None:
    text, ids = IN_BLOCKS[name]
    path = tmp_path / "hostile.yaml"
    path.write_text(blocks(text))
    answered(lambda: load(path), *ids.split())
    path.write_text(HEAD + STAGE)
    (tmp_path / "hostile.mix").write_text(text + "\n")
    answered(lambda: load(path), *ids.split())


def test_ten_million_ops_are_refused_without_being_made(tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(blocks(doubling(25)))
    text = answered(lambda: load(path), "TM1502")
    assert "1,000,000 ops" in text


def test_a_million_ops_less_a_few_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text(blocks(doubling(20)))  # 2**19 ops
    model = load(path)
    assert not model.findings
    assert model.elaborate().num_ops == 2**19


def test_limit_of_work_is_one_finding_however_deep_it_is_met(tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    inner = "block g(x; n: int):\n    a = n\n    for j in 0..9000:\n        a = j\n    return x * a"
    outer = "block f(x):\n    for j in 0..9000:\n        x = x |> g(j)\n    return x"
    path.write_text(blocks(f"{inner}\n\n{outer}"))
    text = answered(lambda: load(path), "TM1501")
    assert text.count("error[") == 1


def test_work_of_one_model_is_not_counted_for_the_next() -> None:
    model = load("mixformer_b0")
    for size in range(32, 32 * 60, 32):
        model.elaborate(size)
    steps = model._elaborator._steps  # type: ignore[union-attr]
    assert 0 < steps < 1_000


# Files


def test_file_of_a_hundred_megabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    assert "100.0 MB" in answered(lambda: load(path), "TM1004")


def test_block_file_of_a_hundred_megabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_text(HEAD + STAGE)
    with (tmp_path / "large.mix").open("wb") as file:
        file.truncate(100_000_000)
    answered(lambda: load(path), "TM1004")


def test_chain_of_bases_without_end_is_a_finding(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"s{i}.yaml").write_text(f"tokenmix: 1\nname: s{i}\nextends: s{i + 1}\n")
    text = answered(lambda: load(tmp_path / "s0.yaml"), "TM1104")
    assert "s40.yaml" in text


def test_base_that_is_a_circle_of_links_is_a_finding(tmp_path: Path) -> None:
    os.symlink(tmp_path / "b.yaml", tmp_path / "a.yaml")
    os.symlink(tmp_path / "a.yaml", tmp_path / "b.yaml")
    (tmp_path / "s.yaml").write_text("tokenmix: 1\nname: s\nextends: a\n")
    answered(lambda: load(tmp_path / "s.yaml"), "TM1001")
    answered(lambda: load(tmp_path / "a.yaml"), "TM1001")


def test_folder_that_is_a_circle_of_links_is_a_finding(tmp_path: Path) -> None:
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    answered(lambda: load(tmp_path / "loop" / "s.yaml"), "TM1001")


def test_recursion_limit_of_python_is_never_met(tmp_path: Path) -> None:
    """Each nesting is within its limit, and all of them together would be too much for the interpreter's stack."""
    path = tmp_path / "hostile.yaml"
    inner = "(" * 39 + "x" + " |> {}" + ")" * 39
    ifs = "".join("  " * i + "if 1 < 2:\n" for i in range(1, 30))
    links = [
        f"block {name}(x):\n{ifs}{'  ' * 30}x = {inner.format(after)}\n  return x"
        for name, after in zip(["f", *(f"f{i}" for i in range(35))], [f"f{i}" for i in range(36)], strict=True)
    ]
    path.write_text(blocks("\n\n".join([*links, "block f35(x):\n  return x |> gelu"])))
    answered(lambda: load(path), "TM1104")
