from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct, size


class Conv(Op):
    """A square convolution, zero padding.

    `padding` -1 stands for `kernel // 2`, which keeps the map size at stride 1. Weights (out, C / groups, kernel,
    kernel), bias (out). Output side: floor((side + 2 * padding - kernel) / stride) + 1.
    """

    signature_text = (
        "conv(x: map; out: int, kernel: int, stride: int = 1, padding: int = -1, groups: int = 1, bias: bool = true)"
    )
    helpers = ("Conv2d",)

    def check(self, x: Tensor, *, out: int, kernel: int, stride: int, padding: int, groups: int, bias: bool) -> None:
        if min(out, kernel, stride, groups) < 1:
            raise self.mistake(
                f"out, kernel, stride and groups are at least 1, got {out}, {kernel}, {stride}, {groups}"
            )
        if padding < -1:
            raise self.mistake(f"padding is 0 or more (or -1 for kernel // 2), got {padding}")
        if x.C % groups or out % groups:
            raise self.mistake(f"{x.C} input and {out} output channels do not both split into {groups} groups")
        pad = kernel // 2 if padding == -1 else padding
        if min(x.H, x.W) + 2 * pad < kernel:
            raise self.mistake(f"a {x.H}x{x.W} map is smaller than the {kernel}x{kernel} kernel", "TM1404")

    def shape(self, x, *, out, kernel, stride, padding, groups, bias):
        pad = kernel // 2 if _is(padding, -1) else padding
        return x.having(C=out, H=(x.H + 2 * pad - kernel) // stride + 1, W=(x.W + 2 * pad - kernel) // stride + 1)

    def weights(self, x, *, out, kernel, stride, padding, groups, bias):
        return {"weight": (out, x.C // groups, kernel, kernel)} | ({"bias": (out,)} if bias else {})

    def cost(self, inputs, outputs, *, out, kernel, stride, padding, groups, bias):
        (y,) = outputs
        macs = size(y) * (inputs[0].C // groups) * kernel**2
        return Tally(macs_conv=macs, bias_conv=size(y) if bias else 0)

    def module(self, x, *, out, kernel, stride, padding, groups, bias):
        pad = kernel // 2 if _is(padding, -1) else padding
        return construct(
            "Conv2d", x.C, out, kernel, stride=(stride, 1), padding=(pad, 0), groups=(groups, 1), bias=(bias, True)
        )


def _is(value, number: int) -> bool:
    return isinstance(value, int) and value == number


op = Conv()
