from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class ScatterTokens(Op):
    """Tokens that stand in a given order back in their places: token i goes to place `order[i]`.

    The inverse of `gather_tokens` with the same order.
    """

    signature_text = "scatter_tokens(x: tokens, order: order)"
    helpers = ("scatter_tokens",)

    def check(self, x: Tensor, order: Tensor) -> None:
        if x.N != order.N:
            raise self.mistake(f"the order is one of {order.N} tokens, got {x.N}: {x}", "TM1402")

    def shape(self, x, order):
        return x

    def cost(self, inputs, outputs):
        return Tally()

    def forward(self, x, order, *, inputs):
        return f"scatter_tokens({x}, {order})"


op = ScatterTokens()
