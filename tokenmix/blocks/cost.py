"""What an op costs, as exact integers, and the conventions under which papers and counters add it up.

A `Tally` is the one record. A convention never counts anything itself: it only weighs entries of the record.
Weights of `fvcore` and `mmcv` are those of fvcore 0.1.5 and of mmcv's counter since 1.3.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["CONVENTIONS", "TALLIES", "Convention", "Tally"]

TALLIES: dict[str, str] = {
    "macs_conv": "multiply-adds of convolutions, 1x1 ones included",
    "macs_linear": "multiply-adds of linear layers",
    "macs_attention": "multiply-adds of products between activations (queries with keys, weights with values)",
    "macs_sampling": "multiply-adds of interpolation at fractional positions",
    "bias_conv": "bias additions of convolutions",
    "bias_linear": "bias additions of linear layers",
    "batch_norm": "elements normalised by batch norm",
    "layer_norm": "elements normalised by layer norm",
    "group_norm": "elements normalised by group norm",
    "relu": "elements through ReLU or ReLU6",
    "gelu": "elements through GELU",
    "activation": "elements through other activation functions",
    "softmax": "elements through a softmax",
    "pool": "input elements of max and average pooling windows",
    "adaptive_pool": "input elements of adaptive average pooling, written as a pooling layer in the paper's code",
    "mean": "input elements of means over tokens or channels, written as a reduction",
    "mean_out": "output elements of such means",
    "resize_nearest": "output elements of nearest-neighbour resizing",
    "resize_bilinear": "output elements of bilinear resizing",
    "grid_sample": "output elements of bilinear sampling at given positions",
    "elementwise": "output elements of sums, products and gates, input elements of `fold`",
}


class Tally(dict[str, int]):
    """Counts by name. Absent means zero; a name that is not in `TALLIES` is refused.

    Example:
        >>> Tally(macs_conv=3) + Tally(macs_conv=4, relu=1)
        {'macs_conv': 7, 'relu': 1}
    """

    def __init__(self, **counts: int):
        unknown = counts.keys() - TALLIES.keys()
        if unknown:
            raise KeyError(f"no tally is called {sorted(unknown)}")
        super().__init__({name: count for name, count in counts.items() if count})

    def __missing__(self, name: str) -> int:
        if name not in TALLIES:
            raise KeyError(name)
        return 0

    def __add__(self, other: Mapping[str, int]) -> Tally:
        return Tally.sum((self, other))

    @staticmethod
    def sum(tallies: Iterable[Mapping[str, int]]) -> Tally:
        total = Tally()
        for tally in tallies:
            for name, count in tally.items():
                total[name] = total[name] + count
        return total


@dataclass(frozen=True)
class Convention:
    """A weighted view of the record.

    Args:
        name: how reports call it.
        weights: tally name -> weight.
        doc: one line on whose rule it is.
        without: labels of submodules it leaves out, at any depth.
    """

    name: str
    weights: Mapping[str, int]
    doc: str = ""
    without: tuple[str, ...] = ()

    def total(self, tally: Mapping[str, int]) -> int:
        return sum(weight * tally.get(name, 0) for name, weight in self.weights.items())


_MACS = ("macs_conv", "macs_linear", "macs_attention")

CONVENTIONS: dict[str, Convention] = {
    c.name: c
    for c in (
        Convention("mac", dict.fromkeys(_MACS, 1), "multiply-adds of convolutions, linear layers and attention"),
        Convention("flops", dict.fromkeys(_MACS, 2), "the same, a multiplication and an addition counted as two"),
        Convention(
            "fvcore",
            dict.fromkeys(_MACS, 1)
            | {"batch_norm": 2, "layer_norm": 5, "group_norm": 5}
            | {"adaptive_pool": 1, "resize_nearest": 1, "resize_bilinear": 4, "grid_sample": 4},
            "what fvcore 0.1.5 counts, fused attention and sampling layers given handlers",
        ),
        Convention(
            "mmcv",
            {"macs_conv": 1, "macs_linear": 1, "bias_conv": 1, "batch_norm": 2, "layer_norm": 2, "group_norm": 2}
            | {"relu": 1, "pool": 1, "adaptive_pool": 1},
            "what mmcv's counter (since 1.3.0) counts: no attention products",
        ),
    )
}
