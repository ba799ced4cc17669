from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size


class BilinearSample(Op):
    """Read a map at a regular grid moved by given distances, by bilinear interpolation between its pixels.

    The result has the size h x w of `dx` and `dy`. Its cell (i, j) reads the map at row r = (i + 1/2 + dy) * H/h - 1/2
    and column s = (j + 1/2 + dx) * W/w - 1/2, pixels lying at whole numbers: the centre of the cell, moved by dx cells
    to the right and dy cells down. With h = H and w = W that is (i + dy, j + dx). The result is the sum over all pixels
    (p, q) of X[p, q] * max(0, 1 - |r - p|) * max(0, 1 - |s - q|). Outside of the map X is zero; with `outside = border`
    r and s are first moved into 0 .. H - 1 and 0 .. W - 1.

    `dx` and `dy` hold G numbers per cell; number g serves the C / G neighbouring channels g*C/G .. (g+1)*C/G - 1.
    Source: Spatial Transformer Networks (Jaderberg et al. 2015), equation 5; bilinear patch embedding of the MAT
    Transformer (Vo 2023), chapter 4, figure 4.3.
    """

    signature_text = "bilinear_sample(x: map, dx: map, dy: map; outside: border | zeros)"
    helpers = ("bilinear_sample",)

    def check(self, x: Tensor, dx: Tensor, dy: Tensor, *, outside: str) -> None:
        if dx != dy:
            raise self.mistake(f"dx and dy differ in shape: {dx} and {dy}", "TM1402")
        if x.C % dx.C:
            raise self.mistake(f"{x.C} channels do not share {dx.C} distances evenly", "TM1402")

    def shape(self, x, dx, dy, *, outside):
        return x.having(H=dx.H, W=dx.W)

    def cost(self, inputs, outputs, *, outside):
        return Tally(grid_sample=size(outputs[0]), macs_sampling=4 * size(outputs[0]))

    def forward(self, x, dx, dy, *, inputs, outside):
        return f'bilinear_sample({x}, {dx}, {dy}, "{outside}")'


op = BilinearSample()
