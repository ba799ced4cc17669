from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class Unfold(Op):
    """Cut a map into overlapping kernel x kernel windows, one every `stride` positions, zero padding `padding`.

    Windows follow each other row by row, so do the kernel**2 tokens of a window. Windows along a side:
    floor((side + 2 * padding - kernel) / stride) + 1. `fold` goes the way back.
    """

    signature_text = "unfold(x: map; kernel: int, stride: int = 1, padding: int = 0)"
    helpers = ("unfold",)

    def check(self, x: Tensor, *, kernel: int, stride: int, padding: int) -> None:
        if min(kernel, stride) < 1 or padding < 0:
            raise self.mistake(
                f"kernel and stride are at least 1, padding 0 or more, got {kernel}, {stride} and {padding}"
            )
        if min(x.H, x.W) + 2 * padding < kernel:
            raise self.mistake(f"a {x.H}x{x.W} map is smaller than the {kernel}x{kernel} window", "TM1404")

    def shape(self, x, *, kernel, stride, padding):
        rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (x.H, x.W))
        return Tensor("windows", (rows * columns, kernel**2, x.C))

    def cost(self, inputs, outputs, *, kernel, stride, padding):
        return Tally()

    def forward(self, x, *, inputs, kernel, stride, padding):
        return f"unfold({x}, {kernel}, {stride}, {padding})"


op = Unfold()
