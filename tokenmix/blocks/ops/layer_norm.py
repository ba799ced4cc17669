from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, construct, size


class LayerNorm(Op):
    """Layer norm over the channels of every token (Ba et al. 2016), with scale and shift unless `affine` is false."""

    signature_text = "layer_norm(x: map | tokens | windows | vector; eps: float = 1e-5, affine: bool = true)"

    def shape(self, x, *, eps, affine):
        return x

    def weights(self, x, *, eps, affine):
        return {"weight": (x.C,), "bias": (x.C,)} if affine else {}

    def cost(self, inputs, outputs, *, eps, affine):
        return Tally(layer_norm=size(outputs[0]))

    def module(self, x, *, eps, affine):
        return construct("nn.LayerNorm", x.C, eps=(eps, 1e-5), elementwise_affine=(affine, True))


op = LayerNorm()
