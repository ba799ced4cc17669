from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, size


class Silu(Op):
    """The sigmoid linear unit, x * sigmoid(x)."""

    signature_text = "silu(x)"

    def shape(self, x):
        return x

    def cost(self, inputs, outputs):
        return Tally(activation=size(outputs[0]))

    def forward(self, x, *, inputs):
        return f"F.silu({x})"


op = Silu()
