from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size


class AxialSample(Op):
    """Read every channel at a fractional distance along one axis: linear interpolation of the zero-extended map.

    With p = position + offset, l = floor(p) and f = p - l the result is (1 - f) * X[l] + f * X[l + 1], X zero outside.
    `offsets` holds C / S numbers per token, in pixels; number g serves the S neighbouring channels g*S .. g*S + S - 1.
    Source: Active Token Mixer (Wei et al. 2023), section 3.2; equals a 1x1 deformable convolution's sampling with the
    other axis at offset 0.
    """

    signature_text = "axial_sample(x: map, offsets: map; axis: height | width)"
    helpers = ("axial_sample",)

    def check(self, x: Tensor, offsets: Tensor, *, axis: str) -> None:
        if (x.H, x.W) != (offsets.H, offsets.W):
            raise self.mistake(f"map and offsets differ in size: {x} and {offsets}", "TM1402")
        if x.C % offsets.C:
            raise self.mistake(f"{x.C} channels do not share {offsets.C} offsets evenly", "TM1402")

    def shape(self, x, offsets, *, axis):
        return x

    def cost(self, inputs, outputs, *, axis):
        return Tally(macs_sampling=2 * size(outputs[0]))

    def forward(self, x, offsets, *, inputs, axis):
        return f'axial_sample({x}, {offsets}, "{axis}")'


op = AxialSample()
