"""Fast kernels against the references they replace: values compared first, then forward and backward in turns.

The cases are those of `tokenmix bench --kernels`: every kernel at the shapes of its family's stages.

example: python benchmarks/kernels.py --json kernels.json
"""

from __future__ import annotations

from measure import Row, build_kernels, main, num_threads, ratio, row

BATCH = 4
# The largest difference between both sides, relative to the largest value.
CLOSE = 1e-4


def compare(case) -> None:
    """Fail where a kernel and its reference differ."""
    import torch
    from torch.utils._pytree import tree_leaves

    with torch.inference_mode():
        pairs = zip(tree_leaves(case.fast(*case.inputs)), tree_leaves(case.reference(*case.inputs)), strict=True)
        for ours, truth in pairs:
            if not (ours - truth).abs().max() <= CLOSE * truth.abs().max():
                raise RuntimeError(f"{case.name}: the kernel and its reference differ")


def collect(quick: bool) -> list[Row]:
    build_kernels()
    import torch

    from tokenmix.fast.cases import find, module
    from tokenmix.runtime.bench import Setting
    from tokenmix.runtime.kernel_bench import bench_kernels

    torch.set_num_threads(num_threads())
    torch.manual_seed(0)
    batch, rounds = (1, 1) if quick else (BATCH, 30)
    for kernel in find([]):
        for case in module(kernel).cases(batch):
            compare(case)
    rows = []
    for timing in bench_kernels([], Setting(batch, (0, 0), train=True), rounds=rounds):
        label = f"{timing.kernel}, {timing.case}: {timing.step}"
        sides = {side: [1e3 * t for t in getattr(timing, side)] for side in ("fast", "reference", "copy")}
        rows.append(row(f"{label}, {timing.runs}", "ms", sides["fast"]))
        rows.append(ratio(f"{label}, reference / {timing.runs}", sides["reference"], sides["fast"]))
        rows.append(ratio(f"{label}, bandwidth over that of a copy", sides["copy"], sides["fast"]))
    return rows


if __name__ == "__main__":
    main(__doc__, collect)
