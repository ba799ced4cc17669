from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct


class WindowAttention(Op):
    """Softmax attention inside non-overlapping square windows: softmax(q k^T * d**-0.5 + bias) v per head.

    Channels split evenly over the heads, d = C / heads. With `bias = relative` every head adds a learned number per
    offset between query and key, row (qh - kh + w - 1) * (2w - 1) + (qw - kw + w - 1) of a ((2w - 1)**2, heads) table.

    `shift` is for maps that were rolled by -`shift` before: the last window of a row or column holds tokens from both
    ends of the map, which must not see each other; -100 is added to their scores. A side of one window is not shifted.
    Source: Swin Transformer (Liu et al. 2021), equation 4, and section 3.2 for the shift; MixFormer, section 3.1. The
    number -100 is the released code's.
    """

    signature_text = (
        "window_attention(q: map, k: map, v: map; heads: int, window: int, bias: none | relative = none, "
        "shift: int = 0)"
    )
    helpers = ("WindowAttention",)

    def check(self, q: Tensor, k: Tensor, v: Tensor, *, heads: int, window: int, bias: str, shift: int) -> None:
        check_windows(self, q, k, v, heads=heads, window=window)
        if not 0 <= shift < window:
            raise self.mistake(f"a shift lies in 0..{window - 1} for windows of {window}, got {shift}")

    def shape(self, q, k, v, *, heads, window, bias, shift):
        return q

    def weights(self, q, k, v, *, heads, window, bias, shift):
        return {"bias_table": ((2 * window - 1) ** 2, heads)} if bias == "relative" else {}

    def cost(self, inputs, outputs, *, heads, window, bias, shift):
        q = inputs[0]
        scores = q.N * window**2 * heads
        return Tally(macs_attention=2 * q.N * window**2 * q.C, softmax=scores)

    def module(self, q, k, v, *, heads, window, bias, shift):
        return construct("WindowAttention", heads, window, relative_bias=(bias == "relative", True), shift=(shift, 0))


def check_windows(op: Op, q: Tensor, k: Tensor, v: Tensor, *, heads: int, window: int) -> None:
    """Whether maps of one shape split into heads and windows."""
    if not q == k == v:
        raise op.mistake(f"q, k and v differ in shape: {q}, {k} and {v}", "TM1402")
    if heads < 1 or window < 1:
        raise op.mistake(f"heads and window are at least 1, got {heads} and {window}")
    if q.C % heads:
        near = [d for d in range(max(heads, q.C - heads + 1), q.C + heads) if d % heads == 0]
        raise op.mistake(
            f"{q.C} channels do not split evenly over {heads} heads ({q.C} / {heads} = {q.C / heads:.4g})",
            help=f"near channel counts: {', '.join(str(d) for d in near)}",
        )
    if q.H % window or q.W % window:
        raise op.mistake(
            f"a {q.H}x{q.W} map does not split into {window}x{window} windows",
            "TM1404",
            help=f"pad it first: `|> pad_to({window})`, and crop afterwards",
        )


op = WindowAttention()
