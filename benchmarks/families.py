"""Every family as `for_inference` leaves it against plain torch layers, and its share of a matrix product's rate.

The plain side is the same spec with `kernels="reference"` and nothing folded. Both hold the same weights.

example: python benchmarks/families.py --json families.json
"""

from __future__ import annotations

from measure import Row, interleaved, main, num_threads, ratio, row

MODELS = ["mixformer_b4", "atmnet_t", "emsnet_tiny", "mat_3", "partialformer_b1", "resnet50", "swin_t"]
CLOSE = 1e-3


def passes(name: str, batches: list[int], rounds: int, dtypes: tuple[str, ...], size: int = 224) -> list[Row]:
    import torch

    import tokenmix
    from tokenmix.runtime.bench import gemm_rate

    plain = tokenmix.build(name, kernels="reference").eval()
    own = tokenmix.build(name)
    own.load_state_dict(plain.state_dict())
    folded = tokenmix.for_inference(own)
    macs = tokenmix.load(name).cost(size)["mac"]
    rows = []
    for batch in batches:
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, got = plain(images), folded(images)
            if not (got - expected).norm() < CLOSE * expected.norm():
                raise RuntimeError(f"{name}: the outputs differ")
            calls = {"plain": lambda images=images: plain(images), "folded": lambda images=images: folded(images)}
            for dtype in dtypes:
                low, small = tokenmix.for_inference(own).to(getattr(torch, dtype)), images.to(getattr(torch, dtype))
                calls[dtype] = lambda low=low, small=small: low(small)
            times = interleaved(calls, rounds, warm_up=2 if rounds > 1 else 0)
        limit = gemm_rate("cpu", "float32", side=2048 if rounds > 1 else 64)
        label = f"{name}, batch {batch}"
        rows += [row(f"{label}: {side}", "ms", times[side]) for side in calls]
        rows.append(ratio(f"{label}: plain / folded", times["plain"], times["folded"]))
        rows += [ratio(f"{label}: folded / {dtype}", times["folded"], times[dtype]) for dtype in dtypes]
        share = [batch * macs / (1e-3 * t) / limit for t in times["folded"]]
        rows.append(
            row(f"{label}: folded, multiply-adds per second over those of a 2048 matrix product", "times", share)
        )
    return rows


def collect(quick: bool) -> list[Row]:
    from tokenmix.fast.native import build_library, library

    if library() is None:  # before the kernels are imported: what runs where is settled then
        build_library()
    import torch

    torch.set_num_threads(num_threads())
    if quick:
        return passes("mixformer_b0", [1], 1, ("bfloat16",), size=64)
    return [r for name in MODELS for r in passes(name, [1, 8], 7, ("bfloat16",))]


if __name__ == "__main__":
    main(__doc__, collect)
