from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor
from tokenmix.blocks.ops.window_attention import check_windows


class AbstractWindowAttention(Op):
    """Attention inside windows where one abstract token per window asks as well: it gathers what the window holds.

    `window_attention(q, k, v; heads, window)` of every token with its window, and of the vector `abstract` with every
    window. The abstract token is the same in all windows and asks only: it is no key and no value. Results are the
    map, and the gathered tokens, one per window, windows row by row:
    `near, gathered = abstract_window_attention(q, k, v, abstract: parameter(C, 0.0); heads, window)`.
    Source: MAT Transformer (Vo 2023), chapter 4, token abstraction.
    """

    signature_text = "abstract_window_attention(q: map, k: map, v: map, abstract: weight; heads: int, window: int)"
    helpers = ("abstract_window_attention",)

    def check(self, q: Tensor, k: Tensor, v: Tensor, abstract: Tensor, *, heads: int, window: int) -> None:
        check_windows(self, q, k, v, heads=heads, window=window)
        if abstract.C != q.C:
            raise self.mistake(f"the abstract token has {abstract.C} channels and the map {q.C}", "TM1402")

    def shape(self, q, k, v, abstract, *, heads, window):
        return q, Tensor("tokens", ((q.H // window) * (q.W // window), q.C))

    def cost(self, inputs, outputs, *, heads, window):
        q = inputs[0]
        pairs = (q.N + outputs[1].N) * window**2
        return Tally(macs_attention=2 * pairs * q.C, softmax=heads * pairs)

    def forward(self, q, k, v, abstract, *, inputs, heads, window):
        return f"abstract_window_attention({q}, {k}, {v}, {abstract}, {heads}, {window})"


op = AbstractWindowAttention()
