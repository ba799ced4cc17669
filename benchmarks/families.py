"""Every family as `for_inference` leaves it against its naive reference, in bfloat16, and beside a matrix product.

The references are those of the test suite (`tests/reference`), written from the papers in plain layers. All sides hold
the same weights, and their outputs are compared before anything is timed.

example: python benchmarks/families.py --json families.json
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from measure import Row, build_kernels, interleaved, main, num_threads, ratio, row

if TYPE_CHECKING:
    from torch import nn

# Shipped spec -> variant of the family's reference.
MODELS = {"mixformer_b4": "B4", "atmnet_t": "T", "emsnet_tiny": "Tiny", "mat_3": "3", "partialformer_b1": "B1"}
QUICK_MODELS = {"mixformer_b0": "B0"}
CLASSES = {
    "mixformer": "MixFormer",
    "atmnet": "ATMNet",
    "emsnet": "EMSNet",
    "mat": "MAT",
    "partialformer": "PartialFormer",
}
# MAT's reference names its patch embeddings after their place, its modules after their kind.
FURTHER_KEYS = {"mat": [(r"^pe\.(\d)\.", lambda m: f"stages.{int(m[1]) + 1}.down.bilinear.")]}
# Relative difference allowed between outputs in float32: norms are folded, sums run in another order.
CLOSE = 1e-3


def naive(name: str, variant: str) -> tuple[nn.Module, list]:
    """The reference of a shipped spec, and the rules by which its weights are named."""
    from tests.families import keys

    family = name.partition("_")[0]
    module = import_module(f"tests.reference.{family}")
    rules = [*getattr(keys, family.upper()), *FURTHER_KEYS.get(family, [])]
    return getattr(module, CLASSES[family])(**module.VARIANTS[variant]).eval(), rules


def passes(name: str, variant: str, batches: list[int], rounds: int, size: int = 224) -> list[Row]:
    import torch

    import tokenmix
    from tests.families.keys import copy_weights
    from tokenmix.runtime.bench import gemm_rate

    reference, rules = naive(name, variant)
    own = tokenmix.build(name)
    drawn = {key: value.clone() for key, value in own.state_dict().items()}
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    partners = copy_weights(reference, own, rules)
    # The references leave some weights undrawn; the module's own go to both sides.
    reference.load_state_dict({theirs: drawn[ours].reshape(shapes[theirs]) for theirs, ours in partners.items()})
    own.load_state_dict(drawn)
    folded = tokenmix.for_inference(own)
    low = tokenmix.for_inference(own).to(torch.bfloat16)
    macs = tokenmix.load(name).cost(size)["mac"]
    rows = []
    for batch in batches:
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        small = images.to(torch.bfloat16)
        with torch.inference_mode():
            expected, got = reference(images), folded(images)
            if not (got - expected).norm() < CLOSE * expected.norm():
                raise RuntimeError(f"{name}: the outputs differ")
            calls = {
                "naive": lambda images=images: reference(images),
                "for_inference": lambda images=images: folded(images),
                "bfloat16": lambda small=small: low(small),
            }
            times = interleaved(calls, rounds, warm_up=2 if rounds > 1 else 0)
        limit = gemm_rate("cpu", "float32", side=2048 if rounds > 1 else 64)
        label = f"{name}, batch {batch}"
        rows += [row(f"{label}: {side}", "ms", times[side]) for side in calls]
        rows.append(ratio(f"{label}: naive / for_inference", times["naive"], times["for_inference"]))
        rows.append(ratio(f"{label}: for_inference / bfloat16", times["for_inference"], times["bfloat16"]))
        share = [batch * macs / (1e-3 * t) / limit for t in times["for_inference"]]
        rows.append(row(f"{label}: for_inference, share of a matrix product's rate", "times", share))
    return rows


def collect(quick: bool) -> list[Row]:
    build_kernels()
    import torch

    torch.set_num_threads(num_threads())
    if quick:
        return [r for name, variant in QUICK_MODELS.items() for r in passes(name, variant, [1], 1, size=64)]
    return [r for name, variant in MODELS.items() for r in passes(name, variant, [1, 8], 15)]


if __name__ == "__main__":
    main(__doc__, collect)
