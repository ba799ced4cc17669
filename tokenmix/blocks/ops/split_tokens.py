from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, call


class SplitTokens(Op):
    """Cut a row of tokens in two: the first `first` tokens, and the rest.

    The rest may be empty: attention to no tokens gives zeros, and what is added to none is lost.
    """

    signature_text = "split_tokens(x: tokens | windows; first: int)"
    is_view = True

    def check(self, x: Tensor, *, first: int) -> None:
        if not 1 <= first <= x.N:
            raise self.mistake(f"cannot cut {x.N} tokens behind number {first}: the first part needs one to {x.N}")

    def shape(self, x, *, first):
        return x.having(N=first), x.having(N=x.N - first)

    def cost(self, inputs, outputs, *, first):
        return Tally()

    def forward(self, x, *, inputs, first):
        return call("tensor_split", x, f"({first},)", "dim=-2")


op = SplitTokens()
