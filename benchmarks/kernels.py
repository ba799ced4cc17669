"""Fast kernels against the references they replace: values compared first, then forward and backward in turns.

example: python benchmarks/kernels.py --json kernels.json
"""

from __future__ import annotations

from measure import Row, interleaved, main, num_threads, ratio, row

# Batch, height, width, channels, channels per offset: ATMNet-T's stages at 224x224, batch 4.
MAPS = [(4, 56, 56, 64, 2), (4, 28, 28, 128, 4), (4, 14, 14, 320, 4), (4, 7, 7, 512, 8)]
QUICK_MAPS = [(1, 8, 8, 8, 2)]
CLOSE = 1e-5


def axial_sampling(case: tuple[int, int, int, int, int], rounds: int) -> list[Row]:
    """One map along the width and then the height, as the mixer does."""
    import torch

    from tokenmix.fast import axial_sample as fast

    B, H, W, C, S = case
    torch.manual_seed(0)
    x = torch.randn(B, H, W, C, requires_grad=True)
    both = (2 * torch.randn(B, H, W, 2 * C // S)).requires_grad_()
    grad = torch.randn(B, H, W, C)

    def forward(sample):
        a, b = both.chunk(2, -1)
        return sample(x, a, "width"), sample(x, b, "height")

    def step(sample):
        torch.autograd.backward(forward(sample), (grad, grad))
        x.grad = both.grad = None

    sides = {"gather arithmetic": fast.reference, "C++": torch.ops.tokenmix.axial_sample}
    with torch.no_grad():
        for ours, truth in zip(forward(sides["C++"]), forward(sides["gather arithmetic"]), strict=True):
            if not (ours - truth).abs().max() <= CLOSE * truth.abs().max():
                raise RuntimeError(f"axial sampling of {case} differs")
        passes = interleaved({n: lambda s=s: forward(s) for n, s in sides.items()}, rounds, warm_up=3)
    steps = interleaved({n: lambda s=s: step(s) for n, s in sides.items()}, rounds, warm_up=3)
    label = f"axial sampling, {B}x{H}x{W}x{C}, both axes"
    rows = []
    for what, times in (("forward", passes), ("forward and backward", steps)):
        rows += [row(f"{label}: {what}, {side}", "ms", times[side]) for side in sides]
        rows.append(ratio(f"{label}: {what}, gather arithmetic / C++", times["gather arithmetic"], times["C++"]))
    return rows


def collect(quick: bool) -> list[Row]:
    from tokenmix.fast.native import build_library, library

    if library() is None:  # before the kernels are imported: what runs where is settled then
        build_library()
    import torch

    torch.set_num_threads(num_threads())
    return [r for case in (QUICK_MAPS if quick else MAPS) for r in axial_sampling(case, 1 if quick else 40)]


if __name__ == "__main__":
    main(__doc__, collect)
