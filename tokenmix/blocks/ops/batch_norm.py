from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, construct, size


class BatchNorm(Op):
    """Batch norm over every channel, with scale and shift; running statistics in eval mode."""

    signature_text = "batch_norm(x: map | vector; eps: float = 1e-5)"
    helpers = ("BatchNorm2d",)

    def shape(self, x, *, eps):
        return x

    def weights(self, x, *, eps):
        return {"weight": (x.C,), "bias": (x.C,)}

    def cost(self, inputs, outputs, *, eps):
        return Tally(batch_norm=size(outputs[0]))

    def module(self, x, *, eps):
        return construct("BatchNorm2d" if x.kind == "map" else "nn.BatchNorm1d", x.C, eps=(eps, 1e-5))


op = BatchNorm()
