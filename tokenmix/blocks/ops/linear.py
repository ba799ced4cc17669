from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct, size


class Linear(Op):
    """A linear layer over the channels of every token, `y = W x + b`. A parameter goes through it once for all images.

    Weights (out, C), bias (out). Multiply-adds: out * C per token.
    """

    signature_text = "linear(x: map | tokens | windows | vector | weight; out: int, bias: bool = true)"

    def check(self, x: Tensor, *, out: int, bias: bool) -> None:
        if out < 1:
            raise self.mistake(f"needs at least one output channel, got {out}")

    def shape(self, x, *, out, bias):
        return x.having(C=out)

    def weights(self, x, *, out, bias):
        return {"weight": (out, x.C)} | ({"bias": (out,)} if bias else {})

    def cost(self, inputs, outputs, *, out, bias):
        return Tally(macs_linear=size(inputs[0]) * out, bias_linear=size(outputs[0]) if bias else 0)

    def module(self, x, *, out, bias):
        return construct("nn.Linear", x.C, out, bias=(bias, True))


op = Linear()
