from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, call, size


class ChannelMean(Op):
    """Mean over the channels at every position, one channel: `x - channel_mean(x)` takes out what channels share."""

    signature_text = "channel_mean(x: map | tokens)"

    def shape(self, x):
        return x.having(C=1)

    def cost(self, inputs, outputs):
        return Tally(mean=size(inputs[0]), mean_out=size(outputs[0]))

    def forward(self, x, *, inputs):
        return call("mean", x, -1, "keepdim=True")


op = ChannelMean()
