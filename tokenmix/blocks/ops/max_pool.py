from tokenmix.blocks.patterns import WindowPool


class MaxPool(WindowPool):
    """The largest value of every kernel x kernel window of a map, channel by channel.

    `padding` counts as minus infinity. Output side: floor((side + 2 * padding - kernel) / stride) + 1. With
    `ceil_mode` the quotient is rounded up: no pixel is left over, and the last windows are what lies inside of the map.
    """

    signature_text = "max_pool(x: map; kernel: int, stride: int = 1, padding: int = 0, ceil_mode: bool = false)"
    helpers = ("max_pool",)


op = MaxPool()
