from tokenmix.blocks.patterns import WindowPool


class AvgPool(WindowPool):
    """The mean of every kernel x kernel window of a map, channel by channel.

    Padded places are not counted in the mean. Output side: floor((side + 2 * padding - kernel) / stride) + 1.
    """

    signature_text = "avg_pool(x: map; kernel: int, stride: int = 1, padding: int = 0)"
    helpers = ("avg_pool",)


op = AvgPool()
