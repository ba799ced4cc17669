from tokenmix.blocks.broadcast import aligned
from tokenmix.blocks.patterns import Elementwise


class Add(Elementwise):
    """Sum of two values, written `a + b`: equal shapes, or a vector or one-channel map spread over a map."""

    signature_text = "add(a, b)"
    sign = "+"

    def forward(self, a, b, *, inputs):
        return " + ".join(aligned((a, b), inputs))


op = Add()
