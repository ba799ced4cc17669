from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct, size


class Pointwise(Op):
    """A 1x1 convolution: the arithmetic of `linear`, counted as a convolution (some counters weigh its bias).

    Weights (out, C), bias (out), applied as one matrix product over the channels-last map.
    """

    signature_text = "pointwise(x: map | tokens | vector; out: int, bias: bool = true)"
    torch_type = "Pointwise"
    helpers = ("Pointwise",)

    def check(self, x: Tensor, *, out: int, bias: bool) -> None:
        if out < 1:
            raise self.mistake(f"needs at least one output channel, got {out}")

    def shape(self, x, *, out, bias):
        return x.having(C=out)

    def weights(self, x, *, out, bias):
        return {"weight": (out, x.C)} | ({"bias": (out,)} if bias else {})

    def cost(self, inputs, outputs, *, out, bias):
        return Tally(macs_conv=size(inputs[0]) * out, bias_conv=size(outputs[0]) if bias else 0)

    def module(self, x, *, out, bias):
        return construct("Pointwise", x.C, out, bias=(bias, True))


op = Pointwise()
