from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class BackgroundAttention(Op):
    """Softmax attention to the tokens that stand behind the `first` ones of an order: softmax(q k^T * d**-0.5) v.

    As `attention` to keys and values gathered from there, d = C / heads; attention to no tokens gives zeros.
    Source: Efficient Vision Transformers with Partial Attention (Vo et al. 2024), single-query attention.
    """

    signature_text = (
        "background_attention(q: tokens, k: map | tokens, v: map | tokens, order: order; first: int, heads: int)"
    )
    helpers = ("background_attention",)

    def check(self, q: Tensor, k: Tensor, v: Tensor, order: Tensor, *, first: int, heads: int) -> None:
        if heads < 1:
            raise self.mistake(f"heads is at least 1, got {heads}")
        if q.C != k.C:
            raise self.mistake(f"queries have {q.C} channels and keys {k.C}", "TM1402")
        if not k.N == v.N == order.N:
            raise self.mistake(f"an order of {order.N} tokens, {k.N} keys and {v.N} values", "TM1402")
        if not 0 <= first <= order.N:
            raise self.mistake(f"there are not {first} first ones of {order.N} tokens")
        for name, x in (("queries", q), ("values", v)):
            if x.C % heads:
                raise self.mistake(f"{x.C} channels of the {name} do not split evenly over {heads} heads")

    def shape(self, q, k, v, order, *, first, heads):
        return q.having(C=v.C)

    def cost(self, inputs, outputs, *, first, heads):
        q, k, v, _ = inputs
        pairs = q.N * (k.N - first)
        return Tally(macs_attention=pairs * (q.C + v.C), softmax=heads * pairs)

    def forward(self, q, k, v, order, *, inputs, first, heads):
        return f"background_attention({q}, {k}, {v}, {order}, {first}, {heads})"


op = BackgroundAttention()
