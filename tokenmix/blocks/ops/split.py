from typing import Any

from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, call

_MOST = 64  # parts; each has a name in the block that splits


class Split(Op):
    """Cut the channels into equal parts: consecutive ones, or with `interleaved` every `parts`-th channel.

    Part k of `split(3)` holds channels k*C/3 .. (k+1)*C/3 - 1; part k of `split(3, interleaved = true)` holds
    channels k, k + 3, k + 6, ...
    """

    signature_text = "split(x: map | tokens | windows | vector; parts: int, interleaved: bool = false)"
    is_view = True

    def check(self, x: Tensor, *, parts: int, interleaved: bool) -> None:
        if not 1 <= parts <= _MOST:
            raise self.mistake(f"parts must lie in 1..{_MOST}, got {parts}")
        if x.C % parts:
            raise self.mistake(
                f"{x.C} channels do not split into {parts} equal parts ({x.C} / {parts} = {x.C / parts:.4g})"
            )

    def shape(self, x, *, parts: Any, interleaved):
        if isinstance(parts, int) and parts > _MOST:
            raise self.mistake(f"there are at most {_MOST} parts")
        if not isinstance(parts, int):
            raise self.mistake("the number of parts must be written as a number", "TM1702")
        return (x.having(C=x.C / parts if not isinstance(x.C, int) else x.C // parts),) * parts

    def cost(self, inputs, outputs, *, parts, interleaved):
        return Tally()

    def forward(self, x, *, inputs, parts, interleaved):
        if parts == 1:
            return x
        if not isinstance(interleaved, bool):
            raise self.mistake("`interleaved` must be written as true or false", "TM1702")
        if interleaved:
            return call("unbind", call("unflatten", x, -1, f"(-1, {parts})"), -1)
        return call("chunk", x, parts, "dim=-1")


op = Split()
