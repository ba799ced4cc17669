from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size


class MaxPool(Op):
    """The largest value of every kernel x kernel window of a map, channel by channel.

    `padding` counts as minus infinity. Output side: floor((side + 2 * padding - kernel) / stride) + 1.
    """

    signature_text = "max_pool(x: map; kernel: int, stride: int = 1, padding: int = 0)"
    helpers = ("max_pool",)

    def check(self, x: Tensor, *, kernel: int, stride: int, padding: int) -> None:
        if min(kernel, stride) < 1 or not 0 <= padding <= kernel // 2:
            raise self.mistake(
                "kernel and stride are at least 1, padding at most half of the kernel, "
                f"got {kernel}, {stride} and {padding}"
            )
        if min(x.H, x.W) + 2 * padding < kernel:
            raise self.mistake(f"a {x.H}x{x.W} map is smaller than the {kernel}x{kernel} window", "TM1404")

    def shape(self, x, *, kernel, stride, padding):
        return x.having(H=(x.H + 2 * padding - kernel) // stride + 1, W=(x.W + 2 * padding - kernel) // stride + 1)

    def cost(self, inputs, outputs, *, kernel, stride, padding):
        return Tally(pool=size(inputs[0]))

    def forward(self, x, *, inputs, kernel, stride, padding):
        return f"max_pool({x}, {kernel}, {stride}, {padding})"


op = MaxPool()
