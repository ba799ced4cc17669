"""Whatever is wrong with a spec, a block file, a path or a setting: findings with a place, and never a traceback."""

from __future__ import annotations

import itertools
import json
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tokenmix.cli import main
from tokenmix.compiler.model import load, parse_size
from tokenmix.compiler.spec import SPEC_KEYS, STAGE_KEYS
from tokenmix.dsl.diagnostics import CATALOGUE, Finding, FindingsError, render

ROOT = Path(__file__).parent.parent.parent
SPECS = sorted((ROOT / "specs").glob("*.yaml"))
BLOCKS = sorted((ROOT / "tokenmix" / "blocks").glob("*.mix"))

TINY = """\
tokenmix: 1
name: tiny
parameters:
  width: 16
  depth: {type: int, min: 1, default: 2}
  rate: {type: rate, default: 0.1}
  act: {choices: [a, b], default: a}
stem: conv(out=width, kernel=4, stride=4, padding=0)
stages:
  - blocks: mixer(expand=2, drop=ramp(rate), act=act)
    repeat: depth
head: norm_mean_head(classes=10)
definitions: |
  block mixer(x; expand: int = 4, drop: rate = 0.0, act: a | b = a):
      if act == "a":
          x = x |> gelu
      return x + drop_path(x |> layer_norm |> mlp(expand); drop)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, so that findings name files without it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def findings_of(spec: Any, **overrides: Any) -> tuple[Finding, ...]:
    """What is wrong, after every way to show it has been tried."""
    model = load(spec, **overrides)
    findings = model.findings
    for finding in findings:
        assert finding.id in CATALOGUE and finding.message
        span = finding.span
        assert span is None or 0 <= span.start <= span.end <= max(len(span.source.text), 1), finding
    text = render(findings)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len(json.loads(render(findings, "json"))["findings"]) == len(findings)
    assert render(findings, "github").count("::error") == len(findings)
    # Values that reach nothing can be counted all the same; lines that nothing reaches cannot.
    if any(f.id != "TM1405" or "behind `return`" in f.message for f in findings):
        with pytest.raises(FindingsError):
            model.cost()
    else:
        model.cost()
    return findings


def ids(findings: tuple[Finding, ...]) -> list[str]:
    return [f.id for f in findings]


def places(findings: tuple[Finding, ...]) -> list[str]:
    return [str(f.span) for f in findings]


def test_the_spec_that_is_broken_below_is_sound(folder: Path) -> None:
    Path("tiny.yaml").write_text(TINY)
    assert findings_of("tiny.yaml") == ()


# Files


def test_missing_file_names_a_near_one(folder: Path) -> None:
    Path("tiny.yaml").write_text(TINY)
    (finding,) = findings_of("tinny.yaml")
    assert (finding.id, finding.help) == ("TM1001", "did you mean `tiny.yaml`?")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/",
        "~",
        "nowhere/a.yaml",
        "a\0b.yaml",
        "x" * 5_000 + ".yaml",
        "x" * 5_000,
        "\ud800.yaml",
        "-",
        "*.yaml",
    ],
)
def test_path_that_leads_nowhere_is_a_finding(folder: Path, name: str) -> None:
    assert ids(findings_of(name)) in (["TM1001"], ["TM1005"])


@pytest.mark.parametrize("name", [None, 3, b"tiny.yaml", object])
def test_spec_that_is_no_path_is_a_finding(folder: Path, name: Any) -> None:
    assert ids(findings_of(name)) in (["TM1001"], ["TM1005"])


def test_folder_names_a_spec_in_it(folder: Path) -> None:
    Path("inner").mkdir()
    (Path("inner") / "tiny.yaml").write_text(TINY)
    (finding,) = findings_of("inner")
    assert (finding.id, finding.message) == ("TM1001", "inner is a folder")
    assert str(Path("inner") / "tiny.yaml") in finding.help
    Path("odd.yaml").mkdir()
    assert ids(findings_of("odd.yaml")) == ["TM1001"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_and_device_are_not_read(folder: Path) -> None:
    os.mkfifo("pipe.yaml")
    assert ids(findings_of("pipe.yaml")) == ["TM1001"]
    assert ids(findings_of("/dev/zero")) == ["TM1001"]


def test_file_without_permission_is_a_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tiny.yaml").write_text(TINY)
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **keywords: Any) -> Any:
        if path.name == "tiny.yaml":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    (finding,) = findings_of("tiny.yaml")
    assert (finding.id, finding.message) == ("TM1001", "tiny.yaml cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("data", "id", "place"),
    [
        (b"", "TM1003", "1:1"),
        (b"\n \n\t\n", "TM1003", "1:1"),
        (b"\xef\xbb\xbf", "TM1003", "1:1"),
        (b"# only\n# comments\n", "TM1003", "1:1"),
        (b"tokenmix: 1\nname: caf\xe9\n", "TM1002", "2:10"),
        (b"tokenmix: 1\nname: a\0b\n", "TM1002", "2:8"),
        (b"\x7fELF\x02\x01\x01" + bytes(range(256)), "TM1002", "1:1"),
        (bytes(range(256)) * 50, "TM1002", "1:1"),
        (TINY.encode("utf-16"), "TM1002", "1:1"),
        (TINY.encode("utf-16-le"), "TM1002", "1:2"),
        ("tokenmix: 1\nname: ti\u202eny\n".encode(), "TM1002", "2:9"),
        ("tokenmix: 1\nname: a\u2028b\n".encode(), "TM1002", "2:8"),
        (b"tokenmix: 1\nname: \x1b[31m\n", "TM1002", "2:7"),
        ("tokenmix: 1\nname: \x9b31m\n".encode(), "TM1002", "2:7"),
        (b"\x80" * 100, "TM1002", "1:1"),
        (b"just words\n", "TM1101", "1:1"),
        (b"- a\n- b\n", "TM1101", "1:1"),
        (b"---\n", "TM1101", "2:1"),
        (b"{}", "TM1202", "1:1"),
    ],
)
def test_file_that_is_no_spec_is_a_finding_with_a_place(folder: Path, data: bytes, id: str, place: str) -> None:
    Path("odd.yaml").write_bytes(data)
    findings = findings_of("odd.yaml")
    assert findings[0].id == id
    assert places(findings)[0] == f"odd.yaml:{place}"


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xfe\0", b"block f(x):\n    return caf\xe9\n", b"block f(x):\n    return \0\n"]
)
def test_block_file_that_is_no_text_is_a_finding_and_nothing_else(folder: Path, data: bytes) -> None:
    """What the file may define is not missed as well."""
    Path("tiny.yaml").write_text(TINY.replace("mlp(expand)", "f"))
    Path("blocks.mix").write_bytes(data)
    findings = findings_of("tiny.yaml")
    assert ids([f for f in findings if f.id != "TM1207"]) in (["TM1002"], ["TM1003"])  # type: ignore[arg-type]
    assert "blocks.mix" in str(findings[0].span) or "blocks.mix" in str(findings[-1].span)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t.replace("\n", "\r"),
        lambda t: "\ufeff" + t,
        lambda t: t + "\n\n\n",
    ],
)
def test_line_ends_and_byte_order_mark_do_not_matter(folder: Path, change: Any) -> None:
    Path("tiny.yaml").write_bytes(change(TINY).encode())
    assert findings_of("tiny.yaml") == ()
    Path("tiny.yaml").write_bytes(change(TINY.replace("layer_norm", "layernorm")).encode())
    (finding,) = findings_of("tiny.yaml")
    assert str(finding.span) == "tiny.yaml:17:33"


@pytest.mark.parametrize(
    "name",
    [
        "../tiny",
        "/etc/passwd",
        "a/../../tiny",
        "a\\b",
        "~/tiny",
        "",
        " ",
        ".",
        "..",
        "a\tb",
        "x" * 500,
        "file:tiny",
        "$HOME",
        "a//b",
    ],
)
def test_base_outside_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "tiny.yaml").write_text(TINY)
    Path("s.yaml").write_text(f"tokenmix: 1\nname: s\nextends: {json.dumps(name)}\n")
    findings = findings_of("s.yaml")
    assert ids(findings) in (["TM1001"], ["TM1005"]), findings
    assert places(findings) == ["s.yaml:3:10"]


@pytest.mark.parametrize("value", ["3", "[a, b]", "{a: b}", "true", "", "null", "2024-01-01"])
def test_base_that_is_no_name_is_a_finding(folder: Path, value: str) -> None:
    Path("s.yaml").write_text(f"tokenmix: 1\nname: s\nextends: {value}\n")
    assert ids(findings_of("s.yaml")) in (["TM1301"], ["TM1005"])


def test_spec_may_extend_the_shipped_one_whose_name_it_has(folder: Path) -> None:
    Path("mixformer_b0.yaml").write_text(
        "tokenmix: 1\nname: mixformer_b0\nextends: mixformer_b0\nwith: {drop_path: 0.1}\n"
    )
    assert findings_of("mixformer_b0.yaml") == ()


def test_spec_that_extends_itself_is_a_circle(folder: Path) -> None:
    Path("s.yaml").write_text("tokenmix: 1\nname: s\nextends: s\n")
    (finding,) = findings_of("s.yaml")
    assert (finding.id, finding.message) == ("TM1209", "specs extend each other in a circle: s -> s")


def test_changed_file_is_read_anew(folder: Path) -> None:
    """Also where size and time stamp stay the same."""
    Path("s.yaml").write_text(TINY)
    stamp = os.stat("s.yaml").st_mtime_ns
    assert load("s.yaml").name == "tiny"
    Path("s.yaml").write_text(TINY.replace("name: tiny", "name: toys"))
    os.utime("s.yaml", ns=(stamp, stamp))
    assert load("s.yaml").name == "toys"


def test_same_mistake_is_found_again_by_the_next_model(folder: Path) -> None:
    first = load("mixformer_b4", C=100).findings
    assert ids(first) == ["TM1403"]
    again = load("mixformer_b4", C=100)
    assert ids(again.findings) == ["TM1403"]
    with pytest.raises(FindingsError):
        again.cost()
    assert ids(load("mixformer_b4", heads=[4, 8, 15, 32]).findings) == ["TM1403"]


# Settings

JUNK: list[Any] = [
    None,
    float("nan"),
    float("inf"),
    -float("inf"),
    {},
    {"a": 1},
    {1: 2},
    set(),
    object(),
    object,
    b"4",
    10**30,
    -(10**30),
    10**5000,
    [],
    [[]],
    [[[[1]]]],
    [None],
    [{}],
    (1, float("nan")),
    "",
    " ",
    "[",
    "]",
    "{",
    "{a: 1}",
    "*x",
    "&x",
    "!!int 3",
    "a: b",
    "a\nb",
    "4\nC: 3",
    "\0",
    "\x1b[31m",
    "#",
    "# 4",
    "'",
    '"',
    "9**9**9",
    "1/0",
    "1/3",
    "C",
    "C + 1",
    "x |> gelu",
    "lambda: 0",
    "__import__('os')",
    "größe",
    "-",
    "--- 3",
    "%",
    "@",
    "`",
    "|",
    ">",
    "0x10",
    "1e3",
    "1e999",
    ".nan",
    ".inf",
    "yes",
    "null",
    "~",
    "true",
    "4.0",
    "'4'",
    "[1, 2",
    "1_000",
    "٣",
    "²",
    range(4),
    iter([4]),
    Decimal("4"),
    1 + 2j,
    True,
    False,
    0,
    -1,
    3.5,
    1e30,
    1e-300,
    "4 # four",
    "- 4",
    "4\t",
    lambda: 4,
    Exception("no"),
    memoryview(b"4"),
    type,
    ...,
    NotImplemented,
    [4] * 20_000,
    "9" * 300,
    "(" * 100,
    "x" * 5_000,
]


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")

    __str__ = __repr__


@pytest.mark.parametrize("number", range(len(JUNK) + 1))
def test_setting_from_python_gives_findings_or_a_model(folder: Path, number: int) -> None:
    Path("tiny.yaml").write_text(TINY)
    value = [*JUNK, _Unprintable()][number]
    for name in ("width", "depth", "rate", "act", "nothing"):
        findings = findings_of("tiny.yaml", **{name: value})
        assert all(f.span is not None for f in findings)
        if name == "nothing":
            assert ids(findings) == ["TM1204"]
    findings_of("mixformer_b0", C=value)
    findings_of("mixformer_b0", heads=value)


def test_setting_that_contains_itself_is_a_finding(folder: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = [4]
    for _ in range(5_000):
        deep = [deep]
    assert ids(findings_of("mixformer_b0", heads=endless)) == ["TM1301"]
    assert ids(findings_of("mixformer_b0", heads=deep)) == ["TM1301"]


def test_setting_cannot_smuggle_in_other_keys(folder: Path) -> None:
    assert ids(findings_of("mixformer_b0", C="24\nname: evil")) != []
    assert ids(findings_of("mixformer_b0", C="24, heads: [1]")) != []


def test_numbers_of_other_libraries_are_numbers(folder: Path) -> None:
    numpy = pytest.importorskip("numpy")
    assert findings_of("mixformer_b0", C=numpy.int64(24), drop_path=numpy.float32(0.1), heads=(3, 6, 12, 24)) == ()
    assert ids(findings_of("mixformer_b0", heads=numpy.array([3, 6, 12, 24]))) == ["TM1301"]


def test_parameter_cannot_be_set_to_itself(folder: Path) -> None:
    (finding,) = findings_of("mixformer_b0", C="C")
    assert (finding.id, str(finding.span)) == ("TM1206", "<set>:1:3")


@pytest.mark.parametrize("size", [0, -1, 10**9, (0, 224), (224, -5), "0", "0x0", "999999999"])
def test_input_size_out_of_range_is_a_finding(size: Any) -> None:
    with pytest.raises(FindingsError, match="TM1404"):
        load("mixformer_b0").cost(size)


# The last window of 12 that begins every 4 pixels is cut by the border if at least 9 pixels are there.
@pytest.mark.parametrize(
    ("pool", "least"),
    [
        ("max_pool(12)", 12),
        ("avg_pool(12)", 12),
        ("max_pool(12, ceil_mode = true)", 12),
        ("max_pool(12, padding = 1, ceil_mode = true)", 10),
        ("max_pool(12, stride = 4, ceil_mode = true)", 9),
    ],
)
def test_a_map_smaller_than_the_window_of_a_pool_is_a_finding(folder: Path, pool: str, least: int) -> None:
    text = "tokenmix: 1\nname: pool\ninput: [8, {}, 16]\nstages: [{{blocks: pooled()}}]\n"
    text += "definitions: |\n  block pooled(x):\n      return x |> {}\n"
    for height in (least, least - 1):
        Path("pool.yaml").write_text(text.format(height, pool))
        assert ids(findings_of("pool.yaml")) == (["TM1404"] if height < least else [])


@pytest.mark.parametrize(
    "size",
    ["", "x", "224x", "1x2x3", "٣", "-3", "1e3", None, 2.5, (1, 2, 3), (1,), "9" * 30, {}, (None, 3), ("a", "b")],
)
def test_input_size_that_is_none_says_what_one_is(size: Any) -> None:
    with pytest.raises(ValueError, match="a size is"):
        parse_size(size)


# Values of the wrong kind, everywhere

VALUES = [
    "",
    "null",
    "3",
    "-1",
    "2.5",
    "true",
    "a word",
    "'quoted'",
    '""',
    "[]",
    "{}",
    "[1, 2]",
    "[[]]",
    "{a: 1}",
    "{a: {b: c}}",
    "[{a: 1}]",
    "x |> y",
    "f(",
    "|\n  a\n  b",
    "1e999",
    "9**9**9",
    "i in 0..3",
    "*a",
    "!t x",
    "café",
    "[3, 224, 224]",
    "- a",
    "a: b",
]


@pytest.mark.parametrize("key", SPEC_KEYS)
def test_any_value_under_any_key_gives_findings_or_a_model(folder: Path, key: str) -> None:
    lines = TINY.split("\n")
    starts = [i for i, line in enumerate(lines) if re.match(r"\w", line)] + [len(lines)]
    kept = ["\n".join(lines[a:b]) for a, b in itertools.pairwise(starts) if not lines[a].startswith(f"{key}:")]
    for i, value in enumerate(VALUES):
        Path(f"s{i}.yaml").write_text("\n".join(kept) + f"\n{key}: {value}\n")
        assert all(f.span is not None for f in findings_of(f"s{i}.yaml"))


INNER = {
    "stages": ["{{blocks: mlp, {0}: {1}}}", "[{{blocks: mlp, {0}: {1}}}]", "[{{{0}: {1}}}]"],
    "parameters": ["{{width: {{default: 16, {0}: {1}}}}}", "{{width: {{{0}: {1}}}}}"],
    "published": ["[{{{0}: {1}}}]"],
    "exact": ["[{{params: 3, {0}: {1}}}]"],
    "conventions": ["{{a: {{{0}: {1}}}}}"],
    "source": ["{{{0}: {1}}}", "{{status: {{{0}: {1}}}}}"],
    "init": ["{{{0}: {1}}}"],
}
KEYS = {
    "stages": [*STAGE_KEYS],
    "parameters": ["type", "default", "min", "max", "length", "choices", "doc"],
    "published": ["table", "input", "dense", "params", "flops", "top1", "rule", "note", "paper", "row"],
    "exact": ["input", "dense", "params", "mac", "nothing"],
    "conventions": ["doc", "without", "macs_conv", "nothing"],
    "source": ["title", "year", "status", "stated", "assumed", "nothing"],
    "init": ["linear", "conv", "position_table", "nothing"],
}


@pytest.mark.parametrize("outer", INNER)
def test_any_value_in_any_inner_place_gives_findings_or_a_model(folder: Path, outer: str) -> None:
    number = 0
    for form in INNER[outer]:
        for key in KEYS[outer]:
            for value in VALUES:
                if "\n" in value:
                    continue
                text = (
                    TINY
                    if outer in ("published", "exact", "conventions", "source", "init")
                    else "tokenmix: 1\nname: s\n"
                )
                if outer == "parameters":
                    text += "stages: [{blocks: mlp(expand=width)}]\n"
                Path(f"s{number}.yaml").write_text(text + f"{outer}: {form.format(key, value)}\n")
                assert all(f.span is not None for f in findings_of(f"s{number}.yaml"))
                number += 1


# The command line


@pytest.mark.parametrize("command", ["check", "flops", "fmt --check"])
def test_findings_exit_with_one_and_write_nothing(
    folder: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TINY.replace("width: 16", "width:   16")  # not canonical either
    Path("tiny.yaml").write_text(text.replace("norm_mean_head(classes=10)", "norm_mean_head(clases=10)"))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    assert main([*command.split(), "tiny.yaml"]) == 1
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err


def test_check_of_many_specs_reports_all_their_findings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text(TINY.replace("head:", "haed:"))
    Path("b.yaml").write_bytes(b"\xff")
    assert main(["check", "a.yaml", "b.yaml", "c.yaml", "mixformer_b4"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("error[") == 3 and shown.rstrip().endswith("3 findings")
