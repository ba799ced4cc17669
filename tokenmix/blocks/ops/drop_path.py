from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, construct


class DropPath(Op):
    """Stochastic depth (Huang et al. 2016): in training, zero the value for whole images with probability `rate`.

    What is kept is divided by 1 - rate. Nothing happens in eval mode or at rate 0.
    """

    signature_text = "drop_path(x; rate: rate)"
    is_view = True
    helpers = ("DropPath",)

    def shape(self, x, *, rate):
        return x

    def cost(self, inputs, outputs, *, rate):
        return Tally()

    def module(self, x, *, rate):
        return construct("DropPath", rate)


op = DropPath()
