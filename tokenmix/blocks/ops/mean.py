from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, call, size


class Mean(Op):
    """Mean of every channel over all tokens of an image, as a plain reduction."""

    signature_text = "mean(x: map | tokens)"

    def shape(self, x):
        return Tensor("vector", (x.C,))

    def cost(self, inputs, outputs):
        return Tally(mean=size(inputs[0]), mean_out=size(outputs[0]))

    def forward(self, x, *, inputs):
        return call("mean", x, "(1, 2)" if inputs[0].kind == "map" else "1")


op = Mean()
