from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op


class Roll(Op):
    """A map moved down by `rows` and right by `columns`; what leaves on one side comes back on the other.

    y(i, j) = x(i - rows mod H, j - columns mod W). Negative numbers move up and left.
    Source: the cyclic shift of Swin Transformer (Liu et al. 2021), section 3.2.
    """

    signature_text = "roll(x: map; rows: int, columns: int)"
    helpers = ("roll",)

    def shape(self, x, *, rows, columns):
        return x

    def cost(self, inputs, outputs, *, rows, columns):
        return Tally()

    def forward(self, x, *, inputs, rows, columns):
        return f"roll({x}, {rows}, {columns})"


op = Roll()
