from tokenmix.blocks.broadcast import aligned, bracketed
from tokenmix.blocks.patterns import Elementwise


class Sub(Elementwise):
    """Difference of two values, written `a - b`; shapes as for a sum."""

    signature_text = "sub(a, b)"
    sign = "-"

    def forward(self, a, b, *, inputs):
        a, b = aligned((a, b), inputs)
        return f"{a} - {bracketed(b)}"


op = Sub()
