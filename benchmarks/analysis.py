"""How long it takes to learn what a model costs: tokenmix against building the model and counting a pass.

example: python benchmarks/analysis.py --json analysis.json
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from measure import ROOT, Row, interleaved, main, process, ratio, row

# A model of about 4 G multiply-adds each: a window transformer, a pyramid transformer, a plain convolutional network;
# then the very module that tokenmix emits, counted the rivals' way.
OURS = "mixformer_b4"
RIVALS = ["swin_tiny_patch4_window7_224", "pvt_v2_b2", "resnet50", f"tokenmix:{OURS}"]
COUNTERS = {"fvcore": "fvcore", "torch_meta": "torch's counter on meta tensors"}


def collect(quick: bool) -> list[Row]:
    return [*cold(quick), *warm(quick), *image_size(quick), *warm_rivals(quick)]


def _rivals(quick: bool) -> Iterator[tuple[str, str, str]]:
    """(counter, model, label) of everything that can be run here."""
    if find_spec("torch") is None:
        return
    for counter, name in [("fvcore", "resnet50")] if quick else itertools.product(COUNTERS, RIVALS):
        needed = [*(["fvcore"] if counter == "fvcore" else []), *([] if ":" in name else ["timm"])]
        missing = [package for package in needed if find_spec(package) is None]
        if missing:
            print(f"left out: {name} with {counter}, for {', '.join(missing)} is not installed")
        else:
            yield counter, name, f"{name.replace('tokenmix:', 'emitted ')}, {COUNTERS[counter]}"


def cold(quick: bool) -> list[Row]:
    """Whole processes, from the interpreter's start to its exit."""
    specs = sorted((ROOT / "specs").glob("*.yaml"))
    everything = f"cold: tokenmix flops, all {len(specs)} shipped files"
    one = f"cold: tokenmix flops, {OURS} at 224"
    calls = {
        "cold: python -c pass": process("-c", "pass"),
        "cold: python -c 'import torch'": process("-c", "import torch"),
        everything: process("-m", "tokenmix", "flops", *specs),
        one: process("-m", "tokenmix", "flops", ROOT / f"specs/{OURS}.yaml", "--size", "224"),
    }
    labels = []
    for counter, name, label in _rivals(quick):
        labels.append(f"cold: {label}")
        calls[labels[-1]] = process(ROOT / "benchmarks/rivals.py", counter, name)
    times = interleaved(calls, 1 if quick else 8, warm_up=0 if quick else 1)
    rows = [row(name, "ms", values) for name, values in times.items()]
    return rows + [ratio(f"{label} / tokenmix flops {OURS}", times[label], times[one]) for label in labels]


def _new_sizes(start: int) -> Iterator[int]:
    """Image sides that the process has not seen; MixFormer and ATMNet take every multiple of 32."""
    return itertools.count(start, 32)


def _new_spec() -> Callable[[], object]:
    """A call that loads and counts a spec file of its own, every time with widths not seen before."""
    import tokenmix

    folder = tempfile.TemporaryDirectory()
    paths = []
    for i in range(100):
        path = Path(folder.name) / f"further{i}.yaml"
        path.write_text(
            f"tokenmix: 1\nname: further{i}\nextends: mixformer\n"
            f"with: {{C: {64 + 8 * i}, depths: [2, 2, 8, 8], heads: [4, 4, 4, 4]}}\n"
        )
        paths.append(path)
    unseen = iter(paths)

    def load(folder: tempfile.TemporaryDirectory = folder) -> int:
        return tokenmix.load(next(unseen)).cost()["mac"]

    return load


def warm(quick: bool) -> list[Row]:
    """One more question to a process that has answered others. No answer is in a cache: widths and sizes are new."""
    import tokenmix

    model = tokenmix.load(OURS)
    sizes = _new_sizes(256)
    calls = {
        "warm: one further spec, file to multiply-adds": _new_spec(),
        f"warm: one further input size of {OURS}": lambda: model.cost(next(sizes))["mac"],
    }
    times = interleaved(calls, 3 if quick else 50, warm_up=2)
    return [row(name, "ms", values) for name, values in times.items()]


def image_size(quick: bool) -> list[Row]:
    """Whether a large image takes longer to count than a small one."""
    import tokenmix

    model = tokenmix.load("atmnet_l")
    small, large = _new_sizes(224), _new_sizes(1280)
    calls = {
        "warm: atmnet_l at 224x224 and 32 more every round": lambda: model.cost(next(small))["mac"],
        "warm: atmnet_l at 1280x2048 and 32 more every round": lambda: model.cost((next(large), 2048))["mac"],
    }
    # So few rounds that the small images stay below the large ones, and neither side meets a map of the other's.
    times = interleaved(calls, 3 if quick else 20, warm_up=2)
    small_times, large_times = times.values()
    rows = [row(name, "ms", values) for name, values in times.items()]
    return [*rows, ratio("warm: atmnet_l, 1280x2048 / 224x224", large_times, small_times)]


def warm_rivals(quick: bool) -> list[Row]:
    """Build and count once more where torch, timm and the counter are loaded; torch is loaded for both sides."""
    calls: dict[str, Callable[[], object]] = {"ours": _new_spec()}
    for counter, name, label in _rivals(quick):
        from rivals import COUNTERS as count

        calls[f"warm: {label}"] = lambda counter=counter, name=name: count[counter](name)
    times = interleaved(calls, 1 if quick else 15)
    ours = times.pop("ours")
    rows = [row(name, "ms", values) for name, values in times.items()]
    return rows + [ratio(f"{name} / tokenmix, one further spec", values, ours) for name, values in times.items()]


if __name__ == "__main__":
    main(__doc__, collect)
