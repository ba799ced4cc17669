from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, size


class Relu(Op):
    """The rectifier, max(x, 0)."""

    signature_text = "relu(x)"

    def shape(self, x):
        return x

    def cost(self, inputs, outputs):
        return Tally(relu=size(outputs[0]))

    def forward(self, x, *, inputs):
        return f"F.relu({x})"


op = Relu()
