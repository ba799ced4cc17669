from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class SpaceToDepth(Op):
    """Stack the pixels of every side x side square along the channels: (C, H, W) to (side**2 * C, H/side, W/side).

    Channel (column * side + row) * C + c of the result is channel c of the pixel in that row and column of the square:
    down the columns first, as the released code of Swin concatenates.
    Source: patch merging of Swin Transformer (Liu et al. 2021), section 3.1.
    """

    signature_text = "space_to_depth(x: map; side: int = 2)"
    helpers = ("space_to_depth",)

    def check(self, x: Tensor, *, side: int) -> None:
        if side < 1:
            raise self.mistake(f"side is at least 1, got {side}")
        if x.H % side or x.W % side:
            raise self.mistake(
                f"a {x.H}x{x.W} map does not split into {side}x{side} squares",
                "TM1404",
                help=f"pad it first: `|> pad_to({side})`",
            )

    def shape(self, x, *, side):
        return Tensor("map", (side**2 * x.C, x.H // side, x.W // side))

    def cost(self, inputs, outputs, *, side):
        return Tally()

    def forward(self, x, *, inputs, side):
        return f"space_to_depth({x}, {side})"


op = SpaceToDepth()
