from tokenmix.blocks.broadcast import aligned, bracketed
from tokenmix.blocks.patterns import Elementwise


class Mul(Elementwise):
    """Product of two values position by position, written `a * b`: a gate. Shapes as for a sum."""

    signature_text = "mul(a, b)"
    sign = "*"

    def forward(self, a, b, *, inputs):
        return " * ".join(bracketed(code) for code in aligned((a, b), inputs))


op = Mul()
