from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import construct, size
from tokenmix.blocks.ops.linear import Linear


class Pointwise(Linear):
    """A 1x1 convolution: the arithmetic of `linear`, counted as a convolution (some counters weigh its bias).

    Weights (out, C), bias (out), applied as one matrix product over the channels-last map.
    """

    signature_text = "pointwise(x: map | tokens | vector; out: int, bias: bool = true)"
    helpers = ("Pointwise",)

    def cost(self, inputs, outputs, *, out, bias):
        return Tally(macs_conv=size(inputs[0]) * out, bias_conv=size(outputs[0]) if bias else 0)

    def module(self, x, *, out, bias):
        return construct("Pointwise", x.C, out, bias=(bias, True))


op = Pointwise()
