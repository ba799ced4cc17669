from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size


class AdaptiveAvgPool(Op):
    """The mean of every channel over a grid of `height` x `width` bins that tile the map, whatever its size.

    Bin i of n along a side covers positions floor(i * side / n) up to, not including, ceil((i + 1) * side / n);
    neighbouring bins overlap where n does not divide the side.
    """

    signature_text = "adaptive_avg_pool(x: map; height: int, width: int)"
    helpers = ("adaptive_avg_pool",)

    def check(self, x: Tensor, *, height: int, width: int) -> None:
        if min(height, width) < 1:
            raise self.mistake(f"height and width are at least 1, got {height} and {width}")

    def shape(self, x, *, height, width):
        return x.having(H=height, W=width)

    def cost(self, inputs, outputs, *, height, width):
        return Tally(adaptive_pool=size(inputs[0]))

    def forward(self, x, *, inputs, height, width):
        return f"adaptive_avg_pool({x}, {height}, {width})"


op = AdaptiveAvgPool()
