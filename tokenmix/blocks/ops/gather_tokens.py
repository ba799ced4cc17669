from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class GatherTokens(Op):
    """The tokens of every image in a given order: place i holds token `order[i]`. A map is read row by row.

    With `first` the result holds only that many tokens.
    """

    signature_text = "gather_tokens(x: map | tokens, order: order; first: int = 0)"
    helpers = ("gather_tokens",)

    def check(self, x: Tensor, order: Tensor, *, first: int) -> None:
        if x.N != order.N:
            raise self.mistake(f"the order is one of {order.N} tokens, got {x.N}: {x}", "TM1402")
        if not 0 <= first <= x.N:
            raise self.mistake(f"there are not {first} first ones of {x.N} tokens")

    def shape(self, x, order, *, first):
        return Tensor("tokens", (x.N if _is_all(first) else first, x.C))

    def cost(self, inputs, outputs, *, first):
        return Tally()

    def forward(self, x, order, *, inputs, first):
        return f"gather_tokens({x}, {order})" if _is_all(first) else f"gather_tokens({x}, {order}[:, :{first}])"


def _is_all(first) -> bool:
    return isinstance(first, int) and first == 0


op = GatherTokens()
