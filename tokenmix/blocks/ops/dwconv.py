from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct, size


class DepthwiseConv(Op):
    """A depth-wise convolution: every channel is filtered on its own, zero padding `kernel // 2`.

    Weights (C, 1, kernel, kernel), bias (C). Multiply-adds: kernel**2 per output element.
    """

    signature_text = "dwconv(x: map; kernel: odd, stride: int = 1, bias: bool = true)"
    helpers = ("Conv2d",)

    def check(self, x: Tensor, *, kernel: int, stride: int, bias: bool) -> None:
        if min(kernel, stride) < 1:
            raise self.mistake(f"kernel and stride are at least 1, got {kernel} and {stride}")

    def shape(self, x, *, kernel, stride, bias):
        return x.having(H=(x.H - 1) // stride + 1, W=(x.W - 1) // stride + 1)

    def weights(self, x, *, kernel, stride, bias):
        return {"weight": (x.C, 1, kernel, kernel)} | ({"bias": (x.C,)} if bias else {})

    def cost(self, inputs, outputs, *, kernel, stride, bias):
        (y,) = outputs
        return Tally(macs_conv=size(y) * kernel**2, bias_conv=size(y) if bias else 0)

    def module(self, x, *, kernel, stride, bias):
        return construct(
            "Conv2d", x.C, x.C, kernel, stride=(stride, 1), padding=kernel // 2, groups=x.C, bias=(bias, True)
        )


op = DepthwiseConv()
