from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct, size


class HeadMixing(Op):
    """A linear layer over the heads at every pair of query and key: y[o, i, j] = sum_h W[o, h] s[h, i, j] + b[o].

    Weights (out, heads, 1, 1), bias (out); counted as the 1x1 convolution that it is.
    Source: Talking-Heads Attention (Shazeer et al. 2020), section 3.
    """

    signature_text = "head_mixing(s: scores | window_scores; out: int, bias: bool = true)"
    helpers = ("HeadMixing",)

    def check(self, s: Tensor, *, out: int, bias: bool) -> None:
        if out < 1:
            raise self.mistake(f"needs at least one head, got {out}")

    def shape(self, s, *, out, bias):
        return s.having(h=out)

    def weights(self, s, *, out, bias):
        return {"weight": (out, s.h, 1, 1)} | ({"bias": (out,)} if bias else {})

    def cost(self, inputs, outputs, *, out, bias):
        return Tally(macs_conv=size(inputs[0]) * out, bias_conv=size(outputs[0]) if bias else 0)

    def module(self, s, *, out, bias):
        return construct("HeadMixing", s.h, out, bias=(bias, True))


op = HeadMixing()
