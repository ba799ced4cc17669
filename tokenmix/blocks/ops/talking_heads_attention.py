from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct


class TalkingHeadsAttention(Op):
    """Softmax attention whose heads talk to each other: linear maps across heads before and after the softmax.

    With scores s = q k^T * d**-0.5 of `heads` heads, d = C / heads, at every pair of query and key:
    l = P_l s + b_l gives the logits of `inner` heads, w = softmax(l) over the keys, a = P_w w + b_w the weights of
    `heads` heads, and head number h of the result is a_h v_h. Rows of a need not add up to one.

    Weights (inner, heads), (inner), (heads, inner), (heads); the maps are counted as the 1x1 convolutions they are. It
    is `attention_scores |> head_mixing |> softmax |> head_mixing |> weighted_sum` in one step, which need not hold the
    scores of all pairs at once.
    Source: Talking-Heads Attention (Shazeer et al. 2020), section 3, there without biases.
    """

    signature_text = "talking_heads_attention(q: tokens, k: tokens, v: tokens; heads: int, inner: int)"
    helpers = ("TalkingHeadsAttention",)

    def check(self, q: Tensor, k: Tensor, v: Tensor, *, heads: int, inner: int) -> None:
        if heads < 1 or inner < 1:
            raise self.mistake(f"needs at least one head, got {heads} and {inner}")
        if q.C != k.C:
            raise self.mistake(f"queries have {q.C} channels and keys {k.C}", "TM1402")
        if k.N != v.N:
            raise self.mistake(f"keys have {k.N} tokens and values {v.N}", "TM1402")
        for name, x in (("queries", q), ("values", v)):
            if x.C % heads:
                raise self.mistake(f"{x.C} channels of the {name} do not split evenly over {heads} heads")

    def shape(self, q, k, v, *, heads, inner):
        return q.having(C=v.C)

    def weights(self, q, k, v, *, heads, inner):
        return {
            "logit_mixing": (inner, heads),
            "logit_bias": (inner,),
            "weight_mixing": (heads, inner),
            "weight_bias": (heads,),
        }

    def cost(self, inputs, outputs, *, heads, inner):
        q, k, v = inputs
        pairs = q.N * k.N
        return Tally(
            macs_attention=pairs * (q.C + v.C),
            macs_conv=2 * pairs * heads * inner,
            bias_conv=pairs * (heads + inner),
            softmax=pairs * inner,
        )

    def module(self, q, k, v, *, heads, inner):
        return construct("TalkingHeadsAttention", heads, inner)


op = TalkingHeadsAttention()
