from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, call, size


class WeightedSum(Op):
    """Sum the values with attention weights: output token i of head h is the sum over j of s[h, i, j] * v[h, j].

    Channels of the values split evenly over the heads of the weights; heads stand side by side in the result.
    """

    signature_text = "weighted_sum(s: scores | window_scores, v: map | tokens | windows)"
    helpers = ("weighted_sum",)

    def check(self, s: Tensor, v: Tensor) -> None:
        if (s.kind == "window_scores") != (v.kind == "windows") or (v.kind == "windows" and s.n != v.n):
            raise self.mistake(f"weights and values are not cut into the same windows: {s} and {v}", "TM1402")
        if s.M != v.N:
            raise self.mistake(f"there are weights for {s.M} tokens and {v.N} values", "TM1402")
        if v.C % s.h:
            raise self.mistake(f"{v.C} channels do not split evenly over {s.h} heads")

    def shape(self, s, v):
        return Tensor("windows", (s.n, s.N, v.C)) if s.kind == "window_scores" else Tensor("tokens", (s.N, v.C))

    def cost(self, inputs, outputs):
        return Tally(macs_attention=size(outputs[0]) * inputs[0].M)

    def forward(self, s, v, *, inputs):
        return f"weighted_sum({s}, {call('flatten', v, 1, 2) if inputs[1].kind == 'map' else v})"


op = WeightedSum()
