"""The emitted sources as text, so that a change of the compiler is reviewed as a diff of what users read."""

from pathlib import Path

import pytest

import tokenmix

GOLDENS = Path(__file__).parents[1] / "fixtures" / "emitted"


@pytest.mark.parametrize("name", ["mixformer_b4", "atmnet_t"])
def test_the_emitted_source_is_the_reviewed_one(name, request):
    path = GOLDENS / f"{name}.py.txt"
    source = tokenmix.load(name).source()
    if request.config.getoption("--update-goldens", default=False):
        path.write_text(source)
    assert source == path.read_text()
