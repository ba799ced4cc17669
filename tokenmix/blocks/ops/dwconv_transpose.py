from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct, size


class DepthwiseConvTranspose(Op):
    """A depth-wise transposed convolution with equal kernel and stride: every pixel grows to kernel x kernel pixels.

    Channels are in `out` groups of C / out neighbours, and group j makes channel j of the result:
    y[j, kernel * r + a, kernel * s + b] is the sum over the channels i of the group of x[i, r, s] * weight[i, 0, a, b].
    Weights (C, 1, kernel, kernel), bias (out). Multiply-adds: kernel**2 per input element.
    """

    signature_text = "dwconv_transpose(x: map; out: int, kernel: int, bias: bool = true)"
    helpers = ("ConvTranspose2d",)

    def check(self, x: Tensor, *, out: int, kernel: int, bias: bool) -> None:
        if min(out, kernel) < 1:
            raise self.mistake(f"out and kernel are at least 1, got {out} and {kernel}")
        if x.C % out:
            raise self.mistake(f"{x.C} channels do not split into {out} equal groups, one per output channel")

    def shape(self, x, *, out, kernel, bias):
        return x.having(C=out, H=x.H * kernel, W=x.W * kernel)

    def weights(self, x, *, out, kernel, bias):
        return {"weight": (x.C, 1, kernel, kernel)} | ({"bias": (out,)} if bias else {})

    def cost(self, inputs, outputs, *, out, kernel, bias):
        return Tally(macs_conv=size(inputs[0]) * kernel**2, bias_conv=size(outputs[0]) if bias else 0)

    def module(self, x, *, out, kernel, bias):
        return construct("ConvTranspose2d", x.C, out, kernel, stride=kernel, groups=out, bias=(bias, True))


op = DepthwiseConvTranspose()
