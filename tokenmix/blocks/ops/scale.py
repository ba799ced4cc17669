from tokenmix.blocks.broadcast import bracketed
from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, size


class Scale(Op):
    """A value times a number, written `0.5 * x`, `x / 2` or `-x`."""

    signature_text = "scale(x; by: float)"

    def shape(self, x, *, by):
        return x

    def cost(self, inputs, outputs, *, by):
        return Tally(elementwise=size(outputs[0]))

    def forward(self, x, *, inputs, by):
        return f"-{bracketed(x)}" if by == -1 else f"{bracketed(x)} * {bracketed(str(by))}"


op = Scale()
