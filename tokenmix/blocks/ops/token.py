from tokenmix.blocks.broadcast import bracketed
from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor


class Token(Op):
    """One token of a row as a vector, counted from 0: the class token, or the only one."""

    signature_text = "token(x: tokens; index: int = 0)"
    is_view = True

    def check(self, x: Tensor, *, index: int) -> None:
        if not 0 <= index < x.N:
            raise self.mistake(f"there is no token {index} among {x.N}")

    def shape(self, x, *, index):
        return Tensor("vector", (x.C,))

    def cost(self, inputs, outputs, *, index):
        return Tally()

    def forward(self, x, *, inputs, index):
        return f"{bracketed(x)}[:, {index}]"


op = Token()
