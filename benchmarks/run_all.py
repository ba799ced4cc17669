"""Run the benchmark scripts one after the other and write results.json and RESULTS.md.

example: python benchmarks/run_all.py                all of them, less than half an hour on two cores
         python benchmarks/run_all.py forward        one of them; the results of the others stay as they are
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import ROOT, Row, markdown, process, three_digits

SCRIPTS = {
    "analysis": "What a model costs",
    "emission": "From spec to module",
    "forward": "A forward pass of emitted modules",
    "kernels": "Fast kernels",
    "families": "Every family, for inference",
    "page_faults": "Memory kept or handed back",
}

FAMILIES = ("mixformer_b4", "atmnet_t", "emsnet_tiny", "mat_3", "partialformer_b1")

# More than this part of the processors in other hands, and threads wait for each other instead of computing.
_QUIET = 0.03


def measure(script: str, quick: bool) -> dict[str, Any]:
    """The record that a script writes, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        process(ROOT / f"benchmarks/{script}.py", "--json", file, *(["--quick"] if quick else []))()
        return json.loads(file.read_text())


def aims() -> Iterator[tuple[str, str, str, str]]:
    """What is to be fast, how fast, and the script and the line that measure it."""
    yield "ATMNet-T, batch 8; the released code took 1044 ms", "500 ms", "families", "atmnet_t, batch 8: for_inference"
    for axis in ("height", "width"):
        case = f"4x56x56x64, {axis}"
        yield f"axial sampling alone, {case}", "1.5 ms", "kernels", f"axial_sample, {case}: forward, C++"
    mixformer = "mixformer_b4, batch 8: for_inference, share of a matrix product's rate"
    yield "MixFormer-B4, batch 8, of a matrix product's rate", "0.75", "families", mixformer
    for name in FAMILIES:
        for batch, aim in ((1, "1"), (8, "1.3")):
            label = f"{name}, batch {batch}"
            yield f"{label}, naive reference / for_inference", aim, "families", f"{label}: naive / for_inference"
    for name in FAMILIES:
        label = f"{name}, batch 8"
        yield f"{label}, float32 / bfloat16", "1 if in hardware", "families", f"{label}: for_inference / bfloat16"


def targets(records: dict[str, dict[str, Any]]) -> str:
    """What was to be reached beside what was measured, as far as it was."""
    lines = ["| what | aim | median | min | max | measured by |", "|---|--:|--:|--:|--:|---|"]
    rows = {(script, line["name"]): Row(**line) for script, record in records.items() for line in record["rows"]}
    for what, aim, script, name in aims():
        found = rows.get((script, name))
        numbers = [three_digits(value) for value in (found.median, found.low, found.high)] if found else ["", "", ""]
        lines.append(f"| {what} | {aim} | {' | '.join(numbers)} | `{script}.py` |")
    return "\n".join(lines)


def report(records: dict[str, dict[str, Any]]) -> str:
    """All results as one page."""
    parts = ["# Results\n\nWritten by `python benchmarks/run_all.py`; what the lines mean is said in README.md."]
    parts.append(
        f"## Targets\n\nMilliseconds and ratios of evaluation passes in float32 at 224x224.\n\n{targets(records)}"
    )
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
