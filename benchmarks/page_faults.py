"""Passes with memory handed back to the system and mapped anew, as glibc does, and with `tokenmix.keep_memory()`.

What the allocator does holds for a whole process, so the two sides take turns in fresh processes.

example: python benchmarks/page_faults.py --json page_faults.json
"""

from __future__ import annotations

import statistics

from measure import Row, build_kernels, fresh, main, num_threads, ratio, row

MODELS = ["mixformer_b4", "atmnet_t", "emsnet_tiny", "mat_3", "partialformer_b1"]
SIDES = {"as it is": False, "keep_memory": True}


def passes(name: str, batches: list[int], rounds: int, size: int, keep: bool) -> dict[str, dict[str, float]]:
    """Batch -> median milliseconds and page faults of a pass. Runs in a fresh process."""
    import torch

    import tokenmix
    from tokenmix.runtime.bench import interleaved
    from tokenmix.runtime.memory import page_faults

    if keep and not tokenmix.keep_memory():
        raise RuntimeError("the allocator of this machine takes no advice: there is nothing to compare")
    torch.set_num_threads(num_threads())
    module = tokenmix.build(name, for_inference=True)
    result = {}
    for batch in batches:
        images, faults = torch.zeros(batch, 3, size, size), []

        def run(images: torch.Tensor = images, faults: list[int] = faults) -> None:
            before = page_faults()
            with torch.inference_mode():
                module(images)
            faults.append(page_faults() - before)

        times = interleaved({"pass": run}, rounds, warm_up=3)["pass"]
        result[str(batch)] = {"ms": 1e3 * statistics.median(times), "faults": statistics.median(faults[-rounds:])}
    return result


def collect(quick: bool) -> list[Row]:
    build_kernels()
    rows = []
    batches, rounds, runs, size = ([1], 1, 1, 64) if quick else ([1, 8], 7, 3, 224)
    for name in MODELS[:1] if quick else MODELS:
        seen: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(runs):
            for side, keep in SIDES.items():
                case = {"name": name, "batches": batches, "rounds": rounds, "size": size, "keep": keep}
                seen[side].append(fresh("page_faults", "passes", **case))
        for batch in map(str, batches):
            label = f"{name}, batch {batch}"
            values = {s: [run[batch]["ms"] for run in seen[s]] for s in SIDES}
            rows += [row(f"{label}: time of a pass, {side}", "ms", values[side]) for side in SIDES]
            for side in SIDES:
                rows.append(
                    row(f"{label}: page faults of a pass, {side}", "pages", [r[batch]["faults"] for r in seen[side]])
                )
            rows.append(ratio(f"{label}: time, as it is / keep_memory", *values.values()))
    return rows


if __name__ == "__main__":
    main(__doc__, collect)
