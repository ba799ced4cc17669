from tokenmix.blocks.broadcast import aligned, bracketed, joined
from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, size


class Mul(Op):
    """Product of two values position by position, written `a * b`: a gate. Shapes as for a sum."""

    signature_text = "mul(a, b)"

    def check(self, a, b):
        joined(self, "*", a, b)

    def shape(self, a, b):
        return joined(self, "*", a, b)

    def cost(self, inputs, outputs):
        return Tally(elementwise=size(outputs[0]))

    def forward(self, a, b, *, inputs):
        return " * ".join(bracketed(code) for code in aligned((a, b), inputs))


op = Mul()
