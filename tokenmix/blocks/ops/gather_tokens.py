from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class GatherTokens(Op):
    """The tokens of every image in a given order: place i holds token `order[i]`. A map is read row by row."""

    signature_text = "gather_tokens(x: map | tokens, order: order)"
    helpers = ("gather_tokens",)

    def check(self, x: Tensor, order: Tensor) -> None:
        if x.N != order.N:
            raise self.mistake(f"the order is one of {order.N} tokens, got {x.N}: {x}", "TM1402")

    def shape(self, x, order):
        return Tensor("tokens", (x.N, x.C))

    def cost(self, inputs, outputs):
        return Tally()

    def forward(self, x, order, *, inputs):
        return f"gather_tokens({x}, {order})"


op = GatherTokens()
