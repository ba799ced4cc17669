from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size


class TokenPartition(Op):
    """The positions of the tokens, the `first` ones with the largest mean over their channels in front.

    Both parts are in the order of positions; of tokens with equal means the earlier one is in front. Attention inside
    of a part needs no more of an order than this, which takes no sorting. Means are taken in float32 at least. Which
    token is where is piecewise constant: no gradient passes. Maps are read row by row.
    Source: Efficient Vision Transformers with Partial Attention (Vo et al. 2024), foreground and background.
    """

    signature_text = "token_partition(x: map | tokens; first: int)"
    helpers = ("token_partition",)

    def check(self, x: Tensor, *, first: int) -> None:
        if not 0 <= first <= x.N:
            raise self.mistake(f"there are not {first} first ones of {x.N} tokens")

    def shape(self, x, *, first):
        return Tensor("order", (x.N,))

    def cost(self, inputs, outputs, *, first):
        return Tally(mean=size(inputs[0]), mean_out=inputs[0].N)

    def forward(self, x, *, inputs, first):
        return f"token_partition({x}, {first})"


op = TokenPartition()
