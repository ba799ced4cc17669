"""Time and memory of an evaluation pass of emitted modules, against the naive references of the test suite.

Both sides hold the same weights, and their outputs are compared before anything is timed.

example: python benchmarks/forward.py --json forward.json
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from measure import Row, fresh, interleaved, main, num_threads, peak_mib, ratio, row

if TYPE_CHECKING:
    from torch import nn

# Shipped spec -> family and variant among the references.
MODELS = {"mixformer_b4": ("mixformer", "B4"), "atmnet_t": ("atmnet", "T")}
QUICK_MODELS = {"mixformer_b0": ("mixformer", "B0"), "atmnet_xt": ("atmnet", "xT")}
SIDES = ("reference", "emitted")
SIZE = 224
# Relative difference allowed between outputs in float32: sums run in another order.
CLOSE = 1e-4


def build(side: str, name: str, family: str, variant: str) -> nn.Module:
    """One side's module, freshly initialised, for evaluation."""
    import tokenmix
    from tests.reference import atmnet, mixformer

    if side == "emitted":
        return tokenmix.build(name).eval()
    if family == "mixformer":
        return mixformer.MixFormer(**mixformer.VARIANTS[variant]).eval()
    return atmnet.ATMNet(**atmnet.VARIANTS[variant]).eval()


def peak_of_pass(side: str, name: str, family: str, variant: str, batch: int) -> float:
    """MiB by which one pass raises the peak of a fresh process that has run a small pass before."""
    import torch

    torch.set_num_threads(num_threads())
    module = build(side, name, family, variant)
    images = torch.zeros(batch, 3, SIZE, SIZE)
    with torch.inference_mode():
        module(torch.zeros(1, 3, 64, 64))  # loads the libraries of the backend
        before = peak_mib()
        module(images)
    if peak_mib() == before:
        raise RuntimeError("the peak of this process lies before the pass, perhaps in the process that started it")
    return peak_mib() - before


def memory(models: dict[str, tuple[str, str]], batches: list[int], runs: int) -> list[Row]:
    rows = []
    for name, (family, variant) in models.items():
        for batch in batches:
            peaks: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(runs):
                for side in SIDES:
                    case = {"side": side, "name": name, "family": family, "variant": variant, "batch": batch}
                    peaks[side].append(fresh("forward", "peak_of_pass", **case))
            label = f"{name}, batch {batch}"
            rows += [row(f"{label}: peak memory of a pass, {side}", "MiB", peaks[side]) for side in SIDES]
            rows.append(ratio(f"{label}: memory, reference / emitted", peaks["reference"], peaks["emitted"]))
    return rows


def passes(name: str, family: str, variant: str, batches: list[int], rounds: int) -> list[Row]:
    """Time of a pass, both sides in turns in one process."""
    import torch

    from tests.families import keys

    modules = {side: build(side, name, family, variant) for side in SIDES}
    keys.randomise(modules["reference"])
    rules = keys.MIXFORMER if family == "mixformer" else keys.ATMNET
    keys.copy_weights(modules["reference"], modules["emitted"], rules)
    rows = []
    for batch in batches:
        images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, got = (modules[side](images) for side in SIDES)
            difference = ((got - expected).norm() / expected.norm()).item()
            if not difference < CLOSE:
                raise RuntimeError(f"{name}: the outputs differ by {difference:.1e}, relatively")
            calls = {side: lambda side=side, images=images: modules[side](images) for side in SIDES}
            times = interleaved(calls, rounds, warm_up=2 if rounds > 1 else 0)
        label = f"{name}, batch {batch}"
        rows += [row(f"{label}: time of a pass, {side}", "ms", times[side]) for side in SIDES]
        rows.append(ratio(f"{label}: time, reference / emitted", times["reference"], times["emitted"]))
    return rows


def collect(quick: bool) -> list[Row]:
    models = QUICK_MODELS if quick else MODELS
    batches = [1] if quick else [1, 8]
    # Before torch is loaded: a child's peak begins at that of its parent.
    peaks = memory(dict(list(models.items())[:1]) if quick else models, batches, runs=1 if quick else 5)
    import torch

    torch.set_num_threads(num_threads())
    times = [r for name, which in models.items() for r in passes(name, *which, batches, rounds=1 if quick else 15)]
    return times + peaks


if __name__ == "__main__":
    main(__doc__, collect)
