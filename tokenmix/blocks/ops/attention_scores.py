from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, call, size


class AttentionScores(Op):
    """How well every query fits every key, per head: q k^T * d**-0.5 with d = C / heads.

    `attention` is this, a softmax and a `weighted_sum` in one step; the parts are for mixers that change the scores.
    Source: Attention is All You Need (Vaswani et al. 2017), equation 1.
    """

    signature_text = "attention_scores(q: map | tokens | windows, k: map | tokens | windows; heads: int)"
    helpers = ("attention_scores",)

    def check(self, q: Tensor, k: Tensor, *, heads: int) -> None:
        if (q.kind == "windows") != (k.kind == "windows") or (q.kind == "windows" and q.n != k.n):
            raise self.mistake(f"queries and keys are not cut into the same windows: {q} and {k}", "TM1402")
        if q.C != k.C:
            raise self.mistake(f"queries have {q.C} channels and keys {k.C}", "TM1402")
        if heads < 1 or q.C % heads:
            raise self.mistake(f"{q.C} channels do not split evenly over {heads} heads")

    def shape(self, q, k, *, heads):
        if q.kind == "windows":
            return Tensor("window_scores", (q.n, heads, q.N, k.N))
        return Tensor("scores", (heads, q.N, k.N))

    def cost(self, inputs, outputs, *, heads):
        q, k = inputs
        return Tally(macs_attention=size(q) * k.N)

    def forward(self, q, k, *, inputs, heads):
        rows = [call("flatten", x, 1, 2) if t.kind == "map" else x for x, t in zip((q, k), inputs, strict=True)]
        return f"attention_scores({', '.join(rows)}, {heads})"


op = AttentionScores()
