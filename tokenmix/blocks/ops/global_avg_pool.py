from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size


class GlobalAvgPool(Op):
    """Mean of every channel over the map, written as an adaptive pooling layer (fvcore counts its input elements).

    `mean` is the same arithmetic written as a reduction, which counters do not see.
    """

    signature_text = "global_avg_pool(x: map)"

    def shape(self, x):
        return Tensor("vector", (x.C,))

    def cost(self, inputs, outputs):
        return Tally(adaptive_pool=size(inputs[0]))

    def forward(self, x, *, inputs):
        return f"F.adaptive_avg_pool2d({x}.permute(0, 3, 1, 2), 1).flatten(1)"


op = GlobalAvgPool()
