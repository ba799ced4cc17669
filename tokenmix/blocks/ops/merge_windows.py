from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, call


class MergeWindows(Op):
    """The tokens of all windows in one row, window by window. They are not put back in their places on the map:
    that is `window_merge`."""

    signature_text = "merge_windows(x: windows)"
    is_view = True

    def shape(self, x):
        return Tensor("tokens", (x.n * x.N, x.C))

    def cost(self, inputs, outputs):
        return Tally()

    def forward(self, x, *, inputs):
        return call("flatten", x, 1, 2)


op = MergeWindows()
