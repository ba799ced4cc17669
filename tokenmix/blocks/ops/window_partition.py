from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class WindowPartition(Op):
    """Cut a map into non-overlapping `window` x `window` windows.

    Windows follow each other row by row, so do the window**2 tokens of a window. `window_merge` goes the way back.
    Source: Swin Transformer (Liu et al. 2021), section 3.2.
    """

    signature_text = "window_partition(x: map; window: int)"
    helpers = ("window_partition",)

    def check(self, x: Tensor, *, window: int) -> None:
        if window < 1:
            raise self.mistake(f"window is at least 1, got {window}")
        if x.H % window or x.W % window:
            raise self.mistake(
                f"a {x.H}x{x.W} map does not split into {window}x{window} windows",
                "TM1404",
                help=f"pad it first: `|> pad_to({window})`, and crop afterwards",
            )

    def shape(self, x, *, window):
        return Tensor("windows", ((x.H // window) * (x.W // window), window**2, x.C))

    def cost(self, inputs, outputs, *, window):
        return Tally()

    def forward(self, x, *, inputs, window):
        return f"window_partition({x}, {window})"


op = WindowPartition()
