from tokenmix.blocks.broadcast import aligned, joined
from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, size


class Add(Op):
    """Sum of two values, written `a + b`: equal shapes, or a vector or one-channel map spread over a map."""

    signature_text = "add(a, b)"

    def check(self, a, b):
        joined(self, "+", a, b)

    def shape(self, a, b):
        return joined(self, "+", a, b)

    def cost(self, inputs, outputs):
        return Tally(elementwise=size(outputs[0]))

    def forward(self, a, b, *, inputs):
        return " + ".join(aligned((a, b), inputs))


op = Add()
