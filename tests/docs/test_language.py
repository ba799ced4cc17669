"""Every example of the hand-written pages is run, and every table of names is compared with the code.

The language of a fenced example and the words behind it say what is done:

- `yaml spec`: a whole spec, checked, counted and built. With `base`, what completes the partial examples of its page.
- `yaml part`: keys of a spec; the others come from the `base` example.
- `mix`: block definitions. The last one is applied to a map; every block must be used.
- `mix lines`: the body of a block with the input `x`.
- `python`: doctests. `console`: commands and exactly what they print; `...` stands for figures that vary.

Further words: `fails=TM1203` (this finding and no other), `file=name` (lies beside the later examples of its section),
`free` (not in canonical form).
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import gc
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tokenmix.blocks.cost import CONVENTIONS
from tokenmix.blocks.op import KINDS
from tokenmix.compiler import spec as spec_module
from tokenmix.compiler.graph import BlockGraph
from tokenmix.compiler.model import Model, load
from tokenmix.compiler.report import exact_misses
from tokenmix.dsl import limits
from tokenmix.dsl.diagnostics import FindingsError, render
from tokenmix.dsl.expressions import FUNCTIONS, TYPES
from tokenmix.dsl.formatter import format_text
from tokenmix.dsl.source import Source

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = ("language.md", "pipeline.md", "hybrids.md")


@dataclass(frozen=True)
class Example:
    """A fenced example of a page."""

    page: str
    line: int
    section: str
    language: str
    words: frozenset[str]
    options: dict[str, str] = field(hash=False)
    text: str = field(hash=False)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_examples(page: str) -> Iterator[Example]:
    section = ""
    opened: tuple[int, str, list[str]] | None = None
    for number, line in enumerate((DOCS / page).read_text(encoding="utf-8").split("\n"), 1):
        if opened is None and line.startswith("## "):
            section = line.removeprefix("## ")
        if not line.startswith("```"):
            if opened is not None:
                opened[2].append(line)
        elif opened is None:
            opened = (number, line.removeprefix("```"), [])
        else:
            start, info, lines = opened
            language, *words = shlex.split(info) or [""]
            options = dict(w.split("=", 1) for w in words if "=" in w)
            plain = frozenset(w for w in words if "=" not in w)
            yield Example(page, start, section, language, plain, options, "\n".join(lines) + "\n")
            opened = None
    assert opened is None, f"{page}:{opened}: the fence is never closed"


EXAMPLES = [example for page in PAGES for example in read_examples(page)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small modules run on one thread: several wait for each other longer than they compute."""
    try:
        import torch
    except ImportError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(request, tmp_path, monkeypatch) -> Path:
    """A folder with the hybrid and the files that stand above the example in its section, and the place to be."""
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "hybrid.yaml", tmp_path / "docs")
    example = request.getfixturevalue("example")
    for other in EXAMPLES:
        above = (other.page, other.section) == (example.page, example.section) and other.line < example.line
        if above and "file" in other.options:
            (tmp_path / other.options["file"]).write_text(other.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_example_does_what_the_page_says(example, folder, request):
    runners = {"yaml": run_yaml, "mix": run_mix, "python": run_python, "console": run_console}
    assert example.language in runners, f"{example}: an example without a way to run it"
    runners[example.language](example, folder, request)


def run_yaml(example: Example, folder: Path, request: pytest.FixtureRequest) -> None:
    text = example.text
    if "part" in example.words:
        text = completed(text)
    else:
        assert "spec" in example.words, f"{example}: is it a whole spec or a part?"
    path = folder / example.options.get("file", "example.yaml")
    path.write_text(text)
    model = load(path)
    judge(example, model)
    if "fails" not in example.options and "free" not in example.words:
        assert format_text(Source(str(path), text), tuple(spec_module.SPEC_KEYS)) == text, "not in canonical form"


def completed(part: str) -> str:
    """The base example with the keys of a part in place of its own."""
    base = next(e.text for e in EXAMPLES if "base" in e.words)
    keys = {**top_level(base), **top_level(part)}
    order = [k for k in spec_module.SPEC_KEYS if k in keys] + [k for k in keys if k not in spec_module.SPEC_KEYS]
    return "".join(keys[k] for k in order)


def top_level(text: str) -> dict[str, str]:
    """Key -> its lines."""
    pieces = re.split(r"^(?=\w+:)", text, flags=re.M)
    assert not pieces[0].strip(), f"{pieces[0]!r} stands above the first key"
    return {piece.split(":", 1)[0]: piece for piece in pieces[1:]}


def run_mix(example: Example, folder: Path, request: pytest.FixtureRequest) -> None:
    text = example.text
    if "lines" in example.words:
        lines = text.rstrip("\n").split("\n")
        ends = lines if lines[-1].startswith("return") else [*lines, "return x"]
        text = "block example(x):\n" + "".join(f"    {line}\n" if line else "\n" for line in ends)
    names = re.findall(r"^block (\w+)", text, re.M)
    path = folder / example.options.get("file", "example.mix")
    path.write_text(text)
    (folder / "example.yaml").write_text(completed(f"stages:\n  - {{blocks: {names[-1] if names else 'mlp'}}}\n"))
    model = load(folder / "example.yaml")
    judge(example, model)
    if "fails" not in example.options:
        assert set(names) <= {piece.name for piece in pieces(model.elaborate())}, "a block of the example is never used"
        if "free" not in example.words:
            assert format_text(Source(str(path), text), ()) == text, "not in canonical form"


def judge(example: Example, model: Model) -> None:
    """Hold a model against what its example promises: soundness, or one finding."""
    findings = list(model.findings)
    if "fails" in example.options:
        if not findings:
            try:
                model.source()
            except FindingsError as error:
                findings = list(error.findings)
        if not findings:
            findings = exact_misses(model)
        assert [f.id for f in findings] == [example.options["fails"]], render(findings)
        return
    if model.is_family:
        assert {f.id for f in findings} == {"TM1205"}, render(findings)
        return
    assert not findings, render(findings)
    assert not exact_misses(model)
    cost = model.cost()
    assert cost["mac"] >= 0
    torch = pytest.importorskip("torch")
    from tokenmix.runtime.module import build

    with torch.device("meta"):
        module = build(model)
    assert sum(p.numel() for p in module.parameters()) == cost.params


def pieces(graph: BlockGraph) -> Iterator[BlockGraph]:
    for node in graph.nodes:
        if isinstance(node.target, BlockGraph):
            yield node.target
            yield from pieces(node.target)


def run_python(example: Example, folder: Path, request: pytest.FixtureRequest) -> None:
    test = doctest.DocTestParser().get_doctest(example.text, {}, str(example), str(DOCS / example.page), example.line)
    assert test.examples, f"{example}: no line begins with >>>"
    out = io.StringIO()
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=flags, verbose=False).run(test, out=out.write)
    assert not out.getvalue(), out.getvalue()


def run_console(example: Example, folder: Path, request: pytest.FixtureRequest) -> None:
    session = [(command, expected, run_command(command)) for command, expected in commands(example.text)]
    if request.config.getoption("--update-goldens", default=False):
        update_console(example, session)
        return
    for command, expected, output in session:
        if not matches(expected, output):
            assert output == expected, command


def update_console(example: Example, session: list[tuple[str, str, str]]) -> None:
    """Put what the commands print now into the page, where it is something else."""
    new = "".join(f"$ {command}\n{old if matches(old, now) else now}" for command, old, now in session)
    page = DOCS / example.page
    page.write_text(page.read_text(encoding="utf-8").replace(example.text, new), encoding="utf-8")


def commands(text: str) -> list[tuple[str, str]]:
    """Commands of a session with what stands below each."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.M)
    assert not parts[0], f"{parts[0]!r} stands above the first command"
    return list(zip(parts[1::2], parts[2::2], strict=True))


def run_command(line: str) -> str:
    from tokenmix.cli import main

    program, *arguments = shlex.split(line)
    assert program == "tokenmix", f"only tokenmix can be run here, not {program}"
    out, thresholds = io.StringIO(), gc.get_threshold()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(arguments)
        except SystemExit:
            pass  # how argparse ends `--help`
        finally:
            gc.set_threshold(*thresholds)
    return out.getvalue()


def matches(expected: str, output: str) -> bool:
    """Equal texts, where `...` in what is expected stands for any part of a line."""
    pattern = re.escape(expected).replace(re.escape("..."), "[^\n]*?")
    return re.fullmatch(pattern, output) is not None


# Tables of the page that list all there is: heading -> the names in their first column.
TABLES = {
    "Keys of a spec": set(spec_module.SPEC_KEYS),
    "Keys of a stage": set(spec_module.STAGE_KEYS),
    "Keys of a parameter": set(spec_module.PARAMETER_KEYS),
    "Types": {*TYPES, "[int]", "relative | none"},
    "Functions": set(FUNCTIONS),
    "Kinds of tensors": set(KINDS),
    "Initialisation": set(spec_module.INIT_KEYS),
    "Conventions": set(CONVENTIONS),
}


@pytest.mark.parametrize("heading", TABLES)
def test_table_names_everything_there_is(heading):
    rows = table(heading)
    assert {row[0].strip("`").replace("\\|", "|") for row in rows} == TABLES[heading]


def test_table_of_limits_has_the_numbers_of_the_code():
    rows = {name.strip("`"): int(number.replace(" ", "")) for name, number, *_ in table("Limits")}
    assert rows == {name: getattr(limits, name) for name in limits.__all__}


def table(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading of the language page."""
    page = (DOCS / "language.md").read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", page, re.M | re.S)
    assert found, f"the page has no heading {heading!r}"
    lines = [line for line in found[1].split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_page_names_every_part_of_a_source():
    (row,) = [row for row in table("Keys of a spec") if row[0] == "`source`"]
    assert {f"`{key}`" for key in spec_module.SOURCE_KEYS} == set(re.findall(r"`\w+`", row[1]))
    assert [row[0].strip("`") for row in table("What a model rests on")] == list(spec_module.STATUS_KEYS)


def test_pages_name_files_and_functions_that_exist():
    missing = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        for name in re.findall(r"`((?:tokenmix|specs|docs|tests|benchmarks)/[^`\s]*)`", text):
            path, _, symbol = name.partition("::")
            here = ROOT / path
            if "*" in path or "NAME" in path:
                continue
            if not here.exists() or (symbol and symbol not in defined(here)):
                missing.append(f"{page}: {name}")
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            if not (DOCS / link).exists():
                missing.append(f"{page}: {link}")
    assert not missing


def defined(path: Path) -> set[str]:
    """Names that a module defines at its top."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
    return names


# The hybrid of the last section.


@pytest.fixture(scope="module")
def hybrid() -> Model:
    return load(DOCS / "hybrid.yaml")


def test_hybrid_is_sound_canonical_and_meets_its_exact_figures(hybrid):
    assert not hybrid.findings, render(hybrid.findings)
    assert hybrid.spec is not None and hybrid.spec.exact
    assert not exact_misses(hybrid)
    text = (DOCS / "hybrid.yaml").read_text(encoding="utf-8")
    assert format_text(Source("hybrid.yaml", text), tuple(spec_module.SPEC_KEYS)) == text


def test_hybrid_runs_forward_and_backward_on_a_small_image(hybrid):
    torch = pytest.importorskip("torch")
    from tokenmix.runtime.module import build

    torch.manual_seed(0)
    module = build(hybrid, num_classes=5)
    ramp = [0.1 * i / 8 for i in range(9)]
    assert drop_rates(module) == pytest.approx([rate for rate in ramp for _ in range(2)])
    scores = module(torch.randn(2, 3, 64, 96))
    assert scores.shape == (2, 5)
    scores.square().sum().backward()
    idle = [name for name, p in module.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not idle
    dense = build(hybrid, features_only=True).eval()
    with torch.no_grad():
        maps = dense(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 32, 16, 24), (1, 64, 8, 12), (1, 128, 4, 6), (1, 256, 2, 3)]


def drop_rates(module) -> list[float]:
    return [m.rate for m in module.modules() if type(m).__name__ == "DropPath"]


@pytest.mark.parametrize("size", [(64, 96), (128, 64)], ids=str)
def test_hybrid_count_equals_fvcore(hybrid, size):
    pytest.importorskip("fvcore")
    from tokenmix.runtime.audit import audit

    result = audit(hybrid, size)
    assert not result.findings, render(result.findings)
    assert result.analytic == result.measured > 0
