from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, call


class ToMap(Op):
    """A row of `height * width` tokens as a map, row by row: the way back from `to_tokens`."""

    signature_text = "to_map(x: tokens; height: int, width: int)"
    is_view = True

    def check(self, x: Tensor, *, height: int, width: int) -> None:
        if min(height, width) < 1 or height * width != x.N:
            raise self.mistake(f"{x.N} tokens do not fill a {height}x{width} map", "TM1402")

    def shape(self, x, *, height, width):
        return Tensor("map", (x.C, height, width))

    def cost(self, inputs, outputs, *, height, width):
        return Tally()

    def forward(self, x, *, inputs, height, width):
        return call("unflatten", x, 1, f"({height}, {width})")


op = ToMap()
