from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class Attention(Op):
    """Softmax attention of every token to every token of another value: softmax(q k^T * d**-0.5) v per head.

    Channels split evenly over the heads, d = C / heads. Keys and values may have other tokens than the queries; the
    result has the queries' tokens and the values' channels. Maps are read row by row. Where keys and values are cut
    into windows, so are the queries, and every window attends to itself; otherwise every query attends to all keys.
    Source: Attention is All You Need (Vaswani et al. 2017), equation 1.
    """

    signature_text = (
        "attention(q: map | tokens | windows, k: map | tokens | windows, v: map | tokens | windows; heads: int)"
    )
    helpers = ("attention", "windowed_attention")

    def check(self, q: Tensor, k: Tensor, v: Tensor, *, heads: int) -> None:
        if heads < 1:
            raise self.mistake(f"heads is at least 1, got {heads}")
        asked = (q, k, v) if k.kind == "windows" else (k, v)
        if len({x.n if x.kind == "windows" else None for x in asked}) > 1:
            raise self.mistake(f"q, k and v are not cut into the same windows: {q}, {k} and {v}", "TM1402")
        if q.C != k.C:
            raise self.mistake(f"queries have {q.C} channels and keys {k.C}", "TM1402")
        if k.N != v.N:
            raise self.mistake(f"keys have {k.N} tokens and values {v.N}", "TM1402")
        for name, x in (("queries", q), ("values", v)):
            if x.C % heads:
                raise self.mistake(f"{x.C} channels of the {name} do not split evenly over {heads} heads")

    def shape(self, q, k, v, *, heads):
        return q.having(C=v.C)

    def cost(self, inputs, outputs, *, heads):
        q, k, v = inputs
        pairs = q.N * k.N * (q.n if q.kind == "windows" else 1)
        return Tally(macs_attention=pairs * (q.C + v.C), softmax=heads * pairs)

    def forward(self, q, k, v, *, inputs, heads):
        name = "windowed_attention" if inputs[1].kind == "windows" else "attention"
        return f"{name}({q}, {k}, {v}, {heads})"


op = Attention()
