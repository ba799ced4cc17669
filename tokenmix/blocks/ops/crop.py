from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class Crop(Op):
    """The upper left `height` x `width` part of a map."""

    signature_text = "crop(x: map; height: int, width: int)"
    helpers = ("crop",)
    is_view = True

    def check(self, x: Tensor, *, height: int, width: int) -> None:
        if not (1 <= height <= x.H and 1 <= width <= x.W):
            raise self.mistake(f"cannot cut {height}x{width} out of a {x.H}x{x.W} map")

    def shape(self, x, *, height, width):
        return x.having(H=height, W=width)

    def cost(self, inputs, outputs, *, height, width):
        return Tally()

    def forward(self, x, *, inputs, height, width):
        return f"crop({x}, {height}, {width})"


op = Crop()
