from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, construct, size


class LayerNorm(Op):
    """Layer norm over the channels of every token, with scale and shift (Ba et al. 2016)."""

    signature_text = "layer_norm(x: map | tokens | windows | vector; eps: float = 1e-5)"

    def shape(self, x, *, eps):
        return x

    def weights(self, x, *, eps):
        return {"weight": (x.C,), "bias": (x.C,)}

    def cost(self, inputs, outputs, *, eps):
        return Tally(layer_norm=size(outputs[0]))

    def module(self, x, *, eps):
        return construct("nn.LayerNorm", x.C, eps=(eps, 1e-5))


op = LayerNorm()
