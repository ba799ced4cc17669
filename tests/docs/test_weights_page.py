"""The page on weights: its examples run, its layout is sound, its tables name everything there is."""

import doctest
import re
from pathlib import Path

import pytest

from tokenmix.compiler.layouts import LAYOUT_KEYS, RULE_KEYS, read_layout

PAGE = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_prints_what_the_page_says(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(EXAMPLES[number], {}, f"weights.md {number}", "weights.md", 0)
    said: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=flags, verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


def test_the_layout_of_the_page_is_sound(tmp_path):
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)
    path = tmp_path / "layout.yaml"
    path.write_text(text)
    findings = []
    assert read_layout(path, findings) is not None and not findings


@pytest.mark.parametrize(("heading", "keys"), [("Keys of a layout", LAYOUT_KEYS), ("Keys of a rule", RULE_KEYS)])
def test_table_names_everything_there_is(heading, keys):
    section = re.search(rf"^### {heading}\n(.*?)(?=^#|^-|\Z)", PAGE, re.M | re.S)[1]
    assert re.findall(r"^\| `(\w+)`", section, re.M) == list(keys)
