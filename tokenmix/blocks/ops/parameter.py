from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class Parameter(Op):
    """A learnable vector that no input feeds, such as the scale of a residual branch: `x + y * parameter(C, 1e-6)`.

    Every entry begins at `value`. Weight (size).
    """

    signature_text = "parameter(; size: int, value: float = 1.0)"
    is_parameter = True

    def check(self, *, size: int, value: float) -> None:
        if size < 1:
            raise self.mistake(f"needs at least one entry, got {size}")

    def shape(self, *, size, value):
        return Tensor("weight", (size,))

    def weights(self, *, size, value):
        return {"": (size,)}

    def cost(self, inputs, outputs, *, size, value):
        return Tally()

    def module(self, *, size, value):
        # A whole number would make a tensor of whole numbers.
        number = float(value) if isinstance(value, int | float) else f"float({value})"
        return f"nn.Parameter(torch.full(({size},), {number}))"


op = Parameter()
