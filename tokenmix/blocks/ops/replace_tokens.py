from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class ReplaceTokens(Op):
    """Other tokens in the first places of an order: place `order[i]` holds token i of `tokens`, the rest is as in `x`.

    Undoes `gather_tokens` with the same order and `first` for those tokens. A map is read row by row.
    """

    signature_text = "replace_tokens(x: map | tokens, order: order, tokens: tokens)"
    helpers = ("replace_tokens",)

    def check(self, x: Tensor, order: Tensor, tokens: Tensor) -> None:
        if x.N != order.N:
            raise self.mistake(f"the order is one of {order.N} tokens, got {x.N}: {x}", "TM1402")
        if tokens.N > x.N:
            raise self.mistake(f"there are no {tokens.N} places in {x}", "TM1402")
        if tokens.C != x.C:
            raise self.mistake(f"{tokens.C} channels cannot take the place of {x.C}: {x} and {tokens}", "TM1402")

    def shape(self, x, order, tokens):
        return x

    def cost(self, inputs, outputs):
        return Tally()

    def forward(self, x, order, tokens, *, inputs):
        return f"replace_tokens({x}, {order}, {tokens})"


op = ReplaceTokens()
