"""Everything that is shipped, changed at random, and any text at all: findings or a model, never a traceback."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.compiler.test_bad_input import BLOCKS, SPECS, TINY, findings_of

TOKENS = re.compile(r"[A-Za-z_]\w*|\d+(?:\.\d+)?(?:e[-+]?\d+)?|\s+|[^\w\s]", re.ASCII)
NUMBERS = ["0", "-1", "1000000000000", "0.5", "seven", "10**30", "1e999", ""]


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """A text with a line or token deleted, doubled, moved, misspelt or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            parts, joint = text.split("\n"), "\n"
        else:
            parts, joint = TOKENS.findall(text), ""
        if len(parts) < 2:
            return text
        i, j = (draw(st.integers(0, len(parts) - 1)) for _ in range(2))
        change = draw(st.sampled_from(["delete", "double", "swap", "number", "misspell", "insert"]))
        if change == "delete":
            del parts[i]
        elif change == "double":
            parts.insert(i, parts[i])
        elif change == "swap":
            parts[i], parts[j] = parts[j], parts[i]
        elif change == "number":
            numbers = [k for k, part in enumerate(parts) if part.strip()[:1].isdigit()] or [i]
            parts[numbers[i % len(numbers)]] = draw(st.sampled_from(NUMBERS))
        elif change == "misspell":
            words = [k for k, part in enumerate(parts) if part.strip()[:1].isalpha()] or [i]
            k = words[i % len(words)]
            parts[k] = parts[k][:-1] + draw(st.sampled_from("xe_ \t")) + parts[k][-1:]
        else:
            parts.insert(
                i,
                draw(
                    st.sampled_from(
                        [
                            "(",
                            ")",
                            "[",
                            "]",
                            "{",
                            "}",
                            ":",
                            ",",
                            ";",
                            "|>",
                            "=",
                            "-",
                            '"',
                            "'",
                            "\\",
                            "*",
                            "x",
                            "\n",
                            "  ",
                            "\t",
                            "é",
                            "#",
                        ]
                    )
                ),
            )
        text = joint.join(parts)
    return text


slow = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


@slow
@given(st.data())
def test_mutated_spec_gives_findings_or_a_model(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(SPECS), label="spec")
    text = data.draw(mutated(path.read_text()), label="text")
    folder = tmp_path_factory.getbasetemp() / "specs"
    folder.mkdir(exist_ok=True)
    (folder / path.name).write_text(text)
    try:
        findings = findings_of(folder / path.name)
        assert all(f.span is not None for f in findings)
    finally:
        (folder / path.name).unlink()


@slow
@given(st.data())
def test_mutated_block_file_gives_findings_or_a_model(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(BLOCKS), label="blocks")
    text = data.draw(mutated(path.read_text()), label="text")
    folder = tmp_path_factory.getbasetemp() / "blocks"
    folder.mkdir(exist_ok=True)
    family = "atmnet_xt" if path.stem == "atmnet" else "mixformer_b0"
    (folder / "s.yaml").write_text(f"tokenmix: 1\nname: s\nextends: {family}\n")
    (folder / "s.mix").write_text(text)
    findings = findings_of(folder / "s.yaml")
    assert all(f.span is not None for f in findings)


@slow
@given(st.text(max_size=60))
def test_any_text_as_a_setting_gives_findings_or_a_model(text: str) -> None:
    findings_of("mixformer_b0", C=text)


@slow
@given(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=80),
    st.text(alphabet="abx01 (),;:=|>*-+[]{}\"'\n\t#%.", max_size=80),
)
def test_any_text_as_a_file_gives_findings(
    tmp_path_factory: pytest.TempPathFactory, any_text: str, likely: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    for text in (
        any_text,
        likely,
        "tokenmix: 1\nname: s\nstages: " + likely,
        "tokenmix: 1\nname: s\ndefinitions: |\n  " + any_text,
    ):
        (folder / "s.yaml").write_text(text, encoding="utf-8", newline="")
        assert findings_of(folder / "s.yaml")
    (folder / "s.yaml").write_text(TINY)
    (folder / "s.mix").write_text("block g(x):\n    " + likely + "\n    return x\n", encoding="utf-8")
    findings_of(folder / "s.yaml")
    (folder / "s.mix").unlink()
