import math

from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class WindowMerge(Op):
    """Put square windows back in their places on a `height` x `width` map: the way back from `window_partition`."""

    signature_text = "window_merge(x: windows; height: int, width: int)"
    helpers = ("window_merge",)

    def check(self, x: Tensor, *, height: int, width: int) -> None:
        side = math.isqrt(x.N)
        if side**2 != x.N:
            raise self.mistake(f"{x.N} tokens do not make a square window", "TM1402")
        if min(height, width) < 1 or height % side or width % side or height * width != x.n * x.N:
            raise self.mistake(f"{x.n} windows of {side}x{side} do not fill a {height}x{width} map", "TM1402")

    def shape(self, x, *, height, width):
        return Tensor("map", (x.C, height, width))

    def cost(self, inputs, outputs, *, height, width):
        return Tally()

    def forward(self, x, *, inputs, height, width):
        return f"window_merge({x}, {height}, {width})"


op = WindowMerge()
