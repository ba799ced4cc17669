from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size


class Fold(Op):
    """Put the windows of `unfold` back to their places on a `height` x `width` map; where they overlap they add up.

    What lies on the padding is dropped, and a place that no window covers is zero.
    """

    signature_text = "fold(x: windows; height: int, width: int, kernel: int, stride: int = 1, padding: int = 0)"
    helpers = ("fold",)

    def check(self, x: Tensor, *, height: int, width: int, kernel: int, stride: int, padding: int) -> None:
        if min(height, width, kernel, stride) < 1 or padding < 0:
            raise self.mistake("sizes, kernel and stride are at least 1, padding 0 or more")
        rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        if (x.n, x.N) != (rows * columns, kernel**2):
            raise self.mistake(
                f"a {height}x{width} map has {rows * columns} windows of {kernel**2} tokens, got {x}", "TM1402"
            )

    def shape(self, x, *, height, width, kernel, stride, padding):
        return Tensor("map", (x.C, height, width))

    def cost(self, inputs, outputs, *, height, width, kernel, stride, padding):
        return Tally(elementwise=size(inputs[0]))

    def forward(self, x, *, inputs, height, width, kernel, stride, padding):
        return f"fold({x}, {height}, {width}, {kernel}, {stride}, {padding})"


op = Fold()
