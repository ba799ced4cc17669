from typing import Any

from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, call

_MOST = 64  # parts; each has a name in the block that splits


class SplitChannels(Op):
    """Cut the channels into consecutive parts of the sizes given, which add up to C. `split` makes equal parts."""

    signature_text = "split_channels(x: map | tokens | windows | vector; sizes: [int])"
    is_view = True

    def check(self, x: Tensor, *, sizes: tuple[int, ...]) -> None:
        if not 1 <= len(sizes) <= _MOST or min(sizes) < 1:
            raise self.mistake(f"there are 1 to {_MOST} parts of at least one channel each, got {list(sizes)}")
        if sum(sizes) != x.C:
            raise self.mistake(f"parts of {', '.join(map(str, sizes))} channels add up to {sum(sizes)}, not {x.C}")

    def shape(self, x, *, sizes: Any):
        if not isinstance(sizes, tuple):
            raise self.mistake("the sizes must be written out as a list, part by part", "TM1702")
        return tuple(x.having(C=part) for part in sizes)

    def cost(self, inputs, outputs, *, sizes):
        return Tally()

    def forward(self, x, *, inputs, sizes):
        return x if len(sizes) == 1 else call("split", x, f"[{', '.join(map(str, sizes))}]", "dim=-1")


op = SplitChannels()
