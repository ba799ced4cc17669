from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, size


class Softmax(Op):
    """Softmax across several values of one shape: position by position, the results add up to one.

    `a, b, c = softmax(a, b, c)` turns branch scores into branch weights. One value alone is
    normalised over its channels, attention scores over their keys.
    """

    signature_text = "softmax(branches...)"

    def check(self, *branches):
        if any(b != branches[0] for b in branches):
            shapes = ", ".join(str(b) for b in branches)
            raise self.mistake(f"the values differ in shape: {shapes}", "TM1402")

    def shape(self, *branches):
        return branches

    def cost(self, inputs, outputs):
        return Tally(softmax=sum(size(x) for x in inputs))

    def forward(self, *branches, inputs):
        if len(branches) == 1:
            return f"F.softmax({branches[0]}, dim=-1)"
        return f"torch.stack(({', '.join(branches)})).softmax(0)"


op = Softmax()
