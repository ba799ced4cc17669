"""Every benchmark script runs from end to end and writes numbers; how large they are is not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("fvcore")

SCRIPTS = ("analysis", "emission", "forward", "kernels", "families", "page_faults")
RUN_ALL = Path(__file__).parents[2] / "benchmarks/run_all.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All scripts at once, each writing into its own folder."""
    folders = {script: tmp_path_factory.mktemp(script) for script in SCRIPTS}
    processes = {
        script: subprocess.Popen(
            [sys.executable, RUN_ALL, script, "--quick", "--output", folder],
            # Threads of several processes would wait for each other; compiled kernels go where they are thrown away.
            env=os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for script, folder in folders.items()
    }
    return {s: (p.communicate(timeout=300)[0], p.returncode, folders[s]) for s, p in processes.items()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_quick_run_writes_its_numbers_and_its_page(runs, script):
    output, status, folder = runs[script]
    assert status == 0, output
    record = json.loads((folder / "results.json").read_text())["benchmarks"][script]
    assert record["quick"] and record["machine"]["cores"] >= 1
    assert len({row["name"] for row in record["rows"]}) == len(record["rows"]) > 4
    for row in record["rows"]:
        assert 0 <= row["low"] <= row["median"] <= row["high"] and (row["low"] > 0 or row["unit"] == "pages"), row
    page = (folder / "RESULTS.md").read_text()
    assert all(f"| {row['name']} | {row['unit']} |" in page for row in record["rows"])
