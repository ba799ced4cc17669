"""What the benchmark scripts share: interleaved timing, fresh processes, peak memory, the machine, and the table."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = [
    "ROOT", "Row", "build_kernels", "fresh", "interleaved", "machine", "main", "markdown", "num_threads", "peak_mib",
    "process", "ratio", "row", "three_digits",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
# The checkout is what is measured, whatever is installed; the references are part of its tests.
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: what was measured.
        unit: "ms", "MiB", "pages", or "times" for a ratio.
        median, low, high: over all runs; nothing is thrown away but the warm-up.
    """

    name: str
    unit: str
    median: float
    low: float
    high: float
    runs: int


def row(name: str, unit: str, values: Sequence[float]) -> Row:
    """The median and the whole spread of some values."""
    return Row(name, unit, statistics.median(values), min(values), max(values), len(values))


def ratio(name: str, above: Sequence[float], below: Sequence[float]) -> Row:
    """How many times `below` goes into `above`, round by round, so that what slows a whole round down cancels."""
    return row(name, "times", [a / b for a, b in zip(above, below, strict=True)])


def interleaved(rivals: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Time every rival once a round, in turns: forwards, then backwards, so that none always comes after the same one.

    Args:
        rivals: name -> call.
        rounds: how many times each is timed.
        warm_up: rounds that are run first and not kept.

    Returns:
        name -> milliseconds, round by round.
    """
    taken: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(-warm_up, rounds):
        for name in list(rivals)[:: -1 if number % 2 else 1]:
            gc.collect()
            start = time.perf_counter()
            rivals[name]()
            elapsed = 1000 * (time.perf_counter() - start)
            if number >= 0:
                taken[name].append(elapsed)
    return taken


def _environment() -> dict[str, str]:
    """For child processes: byte code is kept, as on a user's machine, and the checkout is what gets imported."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])}


def process(*arguments: str | Path) -> Callable[[], object]:
    """A call that runs this interpreter with some arguments, from start to exit. It fails where the process does."""
    command = [sys.executable, *map(str, arguments)]

    def run() -> str:
        done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout

    return run


def fresh(script: str, function: str, **arguments: Any) -> Any:
    """The result of a function of a benchmark script, called in a new process; it travels as JSON."""
    code = (
        f"import json, sys\nfrom {script} import {function}\nprint(json.dumps({function}(**json.loads(sys.argv[1]))))"
    )
    output = str(process("-c", code, json.dumps(arguments))())
    return json.loads(output.splitlines()[-1])


def build_kernels() -> None:
    """Compile the C++ kernels if this machine has none; without a compiler this fails: none is left out in silence.

    To be called before the kernels are imported: what runs where is settled then.
    """
    from tokenmix.fast.native import build_library, library

    if library() is None:
        build_library()


def peak_mib() -> float:
    """The most memory this process ever had resident, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int:
    """How many threads torch gets: one per core, unless OMP_NUM_THREADS says otherwise."""
    return int(os.environ.get("OMP_NUM_THREADS") or _cores())


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "torch_threads": num_threads(),
        "timm": _version("timm"),
        "fvcore": _version("fvcore"),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = facts.get("model name", platform.machine())
    widest = next((word for word in ("amx_tile", "avx512f", "avx2") if word in facts.get("flags", "").split()), None)
    return f"{name} ({widest})" if widest else name


def _busy_seconds() -> tuple[float, float] | None:
    """Processor time since the start, of everybody and of this process with its ended children; None off Linux."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return None
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = fields[:8]
    everybody = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
    return everybody, sum(os.times()[:4])


def _share_of_others(before: tuple[float, float] | None, seconds: float) -> float | None:
    """The part of the processors that went to other processes since `before`."""
    now = _busy_seconds()
    if before is None or now is None:
        return None
    others = (now[0] - before[0]) - (now[1] - before[1])
    return round(max(0.0, others) / (seconds * (os.cpu_count() or 1)), 3)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def markdown(rows: Iterable[Row]) -> str:
    """A table of rows, numbers to three digits."""
    lines = ["| measured | unit | median | min | max | runs |", "|---|---|---:|---:|---:|---:|"]
    for r in rows:
        numbers = [three_digits(value) for value in (r.median, r.low, r.high)]
        lines.append(f"| {r.name} | {r.unit} | {' | '.join(numbers)} | {r.runs} |")
    return "\n".join(lines)


def three_digits(value: float) -> str:
    """A number as tables show it."""
    if value <= 0:
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def main(doc: str, collect: Callable[[bool], list[Row]], argv: Sequence[str] | None = None) -> None:
    """The command line of a benchmark script: measure, print the table, write the JSON.

    Args:
        doc: the script's docstring.
        collect: measures; its argument says whether to be quick, which is for trying the script and not for numbers.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the least that runs every line: the numbers mean nothing")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers to FILE as well")
    options = parser.parse_args(argv)
    before, start = _busy_seconds(), time.perf_counter()
    rows = collect(options.quick)
    facts = machine() | {"share_of_others": _share_of_others(before, time.perf_counter() - start)}
    print(f"{', '.join(f'{key} {value}' for key, value in facts.items())}\n\n{markdown(rows)}")
    if options.json:
        record = {"schema": 1, "quick": options.quick, "machine": facts, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
