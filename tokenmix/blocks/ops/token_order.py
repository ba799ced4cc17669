from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size


class TokenOrder(Op):
    """The positions of the tokens, ordered by the mean over their channels, largest first.

    Equal means keep the order of positions (a stable sort), so the result is the same on every machine that computes
    the same means. Means are taken in float32 at least. Which token comes first is piecewise constant: no gradient
    passes. Maps are read row by row.
    Source: Efficient Vision Transformers with Partial Attention (Vo et al. 2024), context scores and their sorting.
    """

    signature_text = "token_order(x: map | tokens)"
    helpers = ("token_order",)

    def shape(self, x):
        return Tensor("order", (x.N,))

    def cost(self, inputs, outputs):
        return Tally(mean=size(inputs[0]), mean_out=inputs[0].N)

    def forward(self, x, *, inputs):
        return f"token_order({x})"


op = TokenOrder()
