from tokenmix.blocks.broadcast import aligned, bracketed, joined
from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, size


class Sub(Op):
    """Difference of two values, written `a - b`; shapes as for a sum."""

    signature_text = "sub(a, b)"

    def check(self, a, b):
        joined(self, "-", a, b)

    def shape(self, a, b):
        return joined(self, "-", a, b)

    def cost(self, inputs, outputs):
        return Tally(elementwise=size(outputs[0]))

    def forward(self, a, b, *, inputs):
        a, b = aligned((a, b), inputs)
        return f"{a} - {bracketed(b)}"


op = Sub()
