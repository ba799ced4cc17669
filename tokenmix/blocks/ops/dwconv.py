from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct, size


class DepthwiseConv(Op):
    """A depth-wise convolution: every channel is filtered on its own, zero padding `kernel // 2`.

    Weights (C, 1, kernel, kernel), bias (C). Multiply-adds: kernel**2 per output element. With `axis` the kernel is
    `kernel` positions along the height or width and one across; multiply-adds: kernel per output element.
    """

    signature_text = (
        "dwconv(x: map; kernel: odd, stride: int = 1, bias: bool = true, axis: both | height | width = both)"
    )
    helpers = ("Conv2d", "AxialConv2d")

    def check(self, x: Tensor, *, kernel: int, stride: int, bias: bool, axis: str) -> None:
        if min(kernel, stride) < 1:
            raise self.mistake(f"kernel and stride are at least 1, got {kernel} and {stride}")

    def shape(self, x, *, kernel, stride, bias, axis):
        return x.having(H=(x.H - 1) // stride + 1, W=(x.W - 1) // stride + 1)

    def weights(self, x, *, kernel, stride, bias, axis):
        taps = (1 if axis == "width" else kernel, 1 if axis == "height" else kernel)
        return {"weight": (x.C, 1, *taps)} | ({"bias": (x.C,)} if bias else {})

    def cost(self, inputs, outputs, *, kernel, stride, bias, axis):
        (y,) = outputs
        taps = kernel**2 if axis == "both" else kernel
        return Tally(macs_conv=size(y) * taps, bias_conv=size(y) if bias else 0)

    def module(self, x, *, kernel, stride, bias, axis):
        if axis != "both":
            return construct("AxialConv2d", x.C, kernel, f'"{axis}"', stride=(stride, 1), bias=(bias, True))
        return construct(
            "Conv2d", x.C, x.C, kernel, stride=(stride, 1), padding=kernel // 2, groups=x.C, bias=(bias, True)
        )


op = DepthwiseConv()
