from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct, size


class PositionEmbedding(Op):
    """Add a learned vector to every position of a map.

    The table, (height * width, C), belongs to maps of `height` x `width`; for another size it is resized by bicubic
    interpolation with antialiasing.
    Source: An Image is Worth 16x16 Words (Dosovitskiy et al. 2021), equation 1 and section 3.2; the interpolation from
    timm.
    """

    signature_text = "position_embedding(x: map; height: int, width: int)"
    helpers = ("PositionEmbedding",)

    def check(self, x: Tensor, *, height: int, width: int) -> None:
        if min(height, width) < 1:
            raise self.mistake(f"height and width are at least 1, got {height} and {width}")

    def shape(self, x, *, height, width):
        return x

    def weights(self, x, *, height, width):
        return {"table": (height * width, x.C)}

    def cost(self, inputs, outputs, *, height, width):
        return Tally(elementwise=size(outputs[0]))

    def module(self, x, *, height, width):
        return construct("PositionEmbedding", x.C, height, width)


op = PositionEmbedding()
