"""Wrong texts and the answers they get: one folder per case, the answer word for word in `expected.txt`.

A folder holds `spec.yaml` (and block files beside it). `arguments.txt` names another spec in its first line, and
settings below it. Cases that are called after a finding also say how to mend it (`fix.txt`) and show it mended
(`right.yaml`); `docs/findings.md` is made of them.
"""

from pathlib import Path

import pytest

import tokenmix
from tokenmix.compiler.report import exact_misses
from tokenmix.compiler.spec import shipped_specs
from tokenmix.dsl.diagnostics import CATALOGUE, render
from tokenmix.dsl.limits import MAX_FILE_BYTES

FOLDER = Path(__file__).parents[1] / "fixtures" / "findings"
PAGE = Path(__file__).parents[2] / "docs" / "findings.md"
SHIPPED = shipped_specs()["mixformer"].parent
CASES = sorted(p.name for p in FOLDER.iterdir() if p.is_dir())
# Found only where a module is built or a file is written; their tests are those of these commands.
ELSEWHERE = {"TM1602": "`tokenmix flops --audit`", "TM1701": "`tokenmix build`", "TM1702": "`tokenmix build`"}


def answer(case: str, name: str = "spec.yaml") -> tuple[str, set[str]]:
    """What a case is answered, and the ids in it. The current folder is that of the case."""
    settings = {}
    if name == "spec.yaml" and Path("arguments.txt").exists():
        first, *rest = Path("arguments.txt").read_text().splitlines()
        name, settings = first, dict(line.split("=", 1) for line in rest)
    if case == "TM1004-too-large":
        Path(name).write_text("# nothing but a comment\n" * (MAX_FILE_BYTES // 20))
    try:
        model = tokenmix.load(name, **settings)
        findings = model.findings or exact_misses(model)
    finally:
        if case == "TM1004-too-large":
            Path(name).unlink()
    # Shipped specs lie wherever tokenmix is installed.
    text = render(findings).replace(f"{SHIPPED}/", "specs/")
    return text + "\n", {f.id for f in findings}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_text_gets_its_answer_word_for_word(case, monkeypatch, update_goldens):
    monkeypatch.chdir(FOLDER / case)
    text, ids = answer(case)
    assert ids, "nothing found"
    if case.startswith("TM"):
        assert case.split("-")[0] in ids
    if update_goldens:
        Path("expected.txt").write_text(text)
    assert text == Path("expected.txt").read_text()


@pytest.mark.parametrize("case", [c for c in CASES if (FOLDER / c / "right.yaml").exists()])
def test_the_mended_text_is_clean(case, monkeypatch):
    monkeypatch.chdir(FOLDER / case)
    assert answer(case, "right.yaml") == ("\n", set())


def test_every_finding_has_a_case_and_a_remedy():
    ids = {c.split("-")[0] for c in CASES if c.startswith("TM")}
    assert ids == set(CATALOGUE) - set(ELSEWHERE)
    assert all((FOLDER / c / "fix.txt").exists() for c in CASES if c.startswith("TM"))


def page() -> str:
    lines = [
        "# Findings",
        "",
        "Everything tokenmix says of a wrong text has an identifier that stays. Each stands here with a text that gets",
        "it, its answer and the remedy. The texts are the tests' own: `tests/fixtures/findings/`.",
    ]
    for id, (slug, meaning) in CATALOGUE.items():
        lines += ["", f"## {id} {slug}", "", meaning[0].upper() + meaning[1:] + "."]
        if id in ELSEWHERE:
            lines += ["", f"Found by {ELSEWHERE[id]}."]
            continue
        folder = next(FOLDER / c for c in CASES if c.startswith(id))
        lines += ["", " ".join((folder / "fix.txt").read_text().split())]
        for path in sorted(folder.glob("*.yaml")) + sorted(folder.glob("*.mix")):
            data = path.read_bytes()
            if path.name == "right.yaml" or b"\0" in data or not data.isascii() or len(data) > 1500 or not data.strip():
                continue
            fence = "yaml" if path.suffix == ".yaml" else "mix"
            lines += ["", f"`{path.name}`:", "", f"```{fence}", data.decode().rstrip("\n"), "```"]
        answered = (folder / "expected.txt").read_text().rstrip("\n")
        if len(answered) < 3000:
            lines += ["", "```text", answered, "```"]
    return "\n".join(lines) + "\n"


def test_the_page_of_findings_is_current(update_goldens):
    if update_goldens:
        PAGE.write_text(page())
    assert PAGE.read_text() == page()
