"""Run the benchmark scripts one after the other and write results.json and RESULTS.md.

example: python benchmarks/run_all.py                all of them, twenty minutes on two cores
         python benchmarks/run_all.py forward        one of them; the results of the others stay as they are
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure import ROOT, Row, markdown, process

SCRIPTS = {
    "analysis": "What a model costs",
    "emission": "From spec to module",
    "forward": "A forward pass of emitted modules",
    "kernels": "Fast kernels",
    "families": "Every family, folded for inference",
}

# More than this part of the processors in other hands, and threads wait for each other instead of computing.
_QUIET = 0.03


def measure(script: str, quick: bool) -> dict[str, Any]:
    """The record that a script writes, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        process(ROOT / f"benchmarks/{script}.py", "--json", file, *(["--quick"] if quick else []))()
        return json.loads(file.read_text())


def report(records: dict[str, dict[str, Any]]) -> str:
    """All results as one page."""
    parts = ["# Results\n\nWritten by `python benchmarks/run_all.py`; what the lines mean is said in README.md."]
    for script, title in SCRIPTS.items():
        if script in records:
            record = records[script]
            about = (
                "{cpu}, {cores} cores, {system}; Python {python}, torch {torch} on {torch_threads} threads, "
                "timm {timm}, fvcore {fvcore}."
            ).format_map(record["machine"])
            others = record["machine"]["share_of_others"]
            if others is not None:
                about += f" Other processes had {others:.0%} of the processors during the run."
                if others > _QUIET:
                    about += " **That is too much: the numbers below are not for quoting.**"
            if record["quick"]:
                about += " **A run with --quick: the numbers mean nothing.**"
            rows = markdown(Row(**row) for row in record["rows"])
            parts.append(f"## {title} (`{script}.py`)\n\n{about}\n\n{rows}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", metavar="SCRIPT", nargs="*", help=f"{', '.join(SCRIPTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="the least that runs every line: the numbers mean nothing")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=ROOT / "benchmarks", help="where to write")
    options = parser.parse_args()
    unknown = set(options.scripts) - set(SCRIPTS)
    if unknown:
        parser.error(f"no script is called {', '.join(sorted(unknown))}; there are {', '.join(SCRIPTS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.json"
    records = json.loads(file.read_text())["benchmarks"] if file.exists() else {}
    for script in options.scripts or SCRIPTS:
        print(f"{script} ...", flush=True)
        records[script] = measure(script, options.quick)
        file.write_text(json.dumps({"schema": 1, "benchmarks": records}, indent=1) + "\n")
        (options.output / "RESULTS.md").write_text(report(records))
    print(f"wrote {file} and {options.output / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
