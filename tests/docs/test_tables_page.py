"""The page of printed figures and the README's sentence about them are what `tokenmix table` prints."""

import re
from pathlib import Path

import pytest

from tokenmix.cli.table_command import headline, page
from tokenmix.compiler.papers import Line, lines_of, papers, tally, title_of
from tokenmix.compiler.spec import shipped_specs

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tables.md"
README = ROOT / "README.md"
HEADLINE = re.compile(r"^Of \d+ printed .*$", re.M)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, list[Line]]]:
    return {paper: lines_of(paper) for paper in papers()}


def test_page_is_what_the_command_prints(found, update_goldens):
    text = page(found, "markdown") + "\n"
    if update_goldens:
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text, "run this test with --update-goldens and review the difference"


def test_readme_shows_the_headline(found, update_goldens):
    text = README.read_text(encoding="utf-8")
    if update_goldens:
        text = HEADLINE.sub(headline(found), text)
        README.write_text(text, encoding="utf-8")
    assert HEADLINE.findall(text) == [headline(found)]


def test_no_miss_is_left_unexplained(found):
    lines = [line for tables in found.values() for rows in tables.values() for line in rows]
    assert tally(lines)["unexplained"] == 0
    assert not [line.spec for line in lines if any(f.status == "off" and not line.note for f in line.figures.values())]


def test_every_printed_row_has_a_paper_with_a_title_and_a_table(found):
    for paper, tables in found.items():
        assert paper in shipped_specs() and title_of(paper) != paper, paper
        assert all(tables), f"{paper}: a row without a table"


def test_no_row_stands_twice_in_a_table(found):
    for paper, tables in found.items():
        for table, rows in tables.items():
            names = [(row.row, row.shape, row.dense) for row in rows]
            assert len(names) == len(set(names)), (paper, table)
