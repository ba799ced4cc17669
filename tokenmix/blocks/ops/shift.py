from tokenmix.blocks.broadcast import bracketed
from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, size


class Shift(Op):
    """A value plus a number, written `x + 1` or `1 - x`."""

    signature_text = "shift(x; by: float)"

    def shape(self, x, *, by):
        return x

    def cost(self, inputs, outputs, *, by):
        return Tally(elementwise=size(outputs[0]))

    def forward(self, x, *, inputs, by):
        return f"{x} + {bracketed(str(by))}"


op = Shift()
