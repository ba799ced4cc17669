from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, construct, size


class GroupNorm(Op):
    """Group norm over all tokens and the channels of a group, with scale and shift (Wu and He 2018)."""

    signature_text = "group_norm(x: map; groups: int = 1, eps: float = 1e-5)"
    helpers = ("GroupNorm",)

    def check(self, x: Tensor, *, groups: int, eps: float) -> None:
        if groups < 1 or x.C % groups:
            raise self.mistake(f"{x.C} channels do not split into {groups} groups")

    def shape(self, x, *, groups, eps):
        return x

    def weights(self, x, *, groups, eps):
        return {"weight": (x.C,), "bias": (x.C,)}

    def cost(self, inputs, outputs, *, groups, eps):
        return Tally(group_norm=size(outputs[0]))

    def module(self, x, *, groups, eps):
        return construct("GroupNorm", groups, x.C, eps=(eps, 1e-5))


op = GroupNorm()
