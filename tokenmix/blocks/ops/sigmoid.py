from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, size


class Sigmoid(Op):
    """The logistic function, 1 / (1 + exp(-x))."""

    signature_text = "sigmoid(x)"

    def shape(self, x):
        return x

    def cost(self, inputs, outputs):
        return Tally(activation=size(outputs[0]))

    def forward(self, x, *, inputs):
        return f"torch.sigmoid({x})"


op = Sigmoid()
