from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size


class Resize(Op):
    """A map at another size: the nearest position's value, or bilinear interpolation between pixel centres.

    A map that has the size already stays as it is, at no cost.
    """

    signature_text = "resize(x: map; height: int, width: int, mode: nearest | bilinear = bilinear)"
    helpers = ("resize",)

    def check(self, x: Tensor, *, height: int, width: int, mode: str) -> None:
        if min(height, width) < 1:
            raise self.mistake(f"height and width are at least 1, got {height} and {width}")

    def shape(self, x, *, height, width, mode):
        return x.having(H=height, W=width)

    def cost(self, inputs, outputs, *, height, width, mode):
        elements = size(outputs[0]) if outputs != inputs else 0
        return Tally(resize_nearest=elements) if mode == "nearest" else Tally(resize_bilinear=elements)

    def forward(self, x, *, inputs, height, width, mode):
        return f'resize({x}, {height}, {width}, "{mode}")'


op = Resize()
