"""How long it takes from a spec to a module, step by step, once torch is loaded.

example: python benchmarks/emission.py --json emission.json
"""

from __future__ import annotations

import time
from itertools import pairwise

from measure import Row, fresh, main, row

# The second one shows what the first one paid for once: grammar, block library, imports.
MODELS = {"first model of the process, mixformer_b4": "mixformer_b4", "second model, mixformer_b5": "mixformer_b5"}
STEPS = {
    "load": "read the spec (and, once, import tokenmix and read the grammar)",
    "source": "check the model and print its source",
    "import": "import the source",
    "meta": "build the module on the meta device",
    "real": "build the module with fresh weights",
}


def steps(models: list[str]) -> list[dict[str, float]]:
    """Milliseconds of every step for some models, one after the other. Runs in a fresh process."""
    import torch

    taken = []
    for name in models:
        marks = [time.perf_counter()]
        import tokenmix
        from tokenmix.runtime.module import class_name, import_source

        model = tokenmix.load(name)
        marks.append(time.perf_counter())
        source = model.source()
        marks.append(time.perf_counter())
        cls = getattr(import_source(source, name), class_name(model))
        marks.append(time.perf_counter())
        with torch.device("meta"):
            cls()
        marks.append(time.perf_counter())
        cls()
        marks.append(time.perf_counter())
        lengths = [1000 * (end - start) for start, end in pairwise(marks)]
        taken.append(dict(zip(STEPS, lengths, strict=True)))
    return taken


def collect(quick: bool) -> list[Row]:
    # One process to warm the disk cache; then each process gives one value of every step.
    runs = [fresh("emission", "steps", models=list(MODELS.values())) for _ in range(1 if quick else 16)]
    runs = runs if quick else runs[1:]
    rows = []
    for number, label in enumerate(MODELS):
        for step, what in STEPS.items():
            rows.append(row(f"{label}: {what}", "ms", [run[number][step] for run in runs]))
        compiled = [sum(run[number][step] for step in ("load", "source", "import")) for run in runs]
        rows.append(row(f"{label}: spec to imported source, the first three together", "ms", compiled))
    return rows


if __name__ == "__main__":
    main(__doc__, collect)
