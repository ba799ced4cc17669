from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, call


class PositionScores(Op):
    """Read the channels at every position of a map as attention scores: one `queries` x `keys` matrix per head.

    Channels run over heads, then queries, then keys: channel (head * queries + query) * keys + key. Positions are
    taken row by row, as the windows of `unfold` are.
    """

    signature_text = "position_scores(x: map; heads: int, queries: int, keys: int)"
    is_view = True

    def check(self, x: Tensor, *, heads: int, queries: int, keys: int) -> None:
        if min(heads, queries, keys) < 1 or heads * queries * keys != x.C:
            raise self.mistake(f"{heads} heads x {queries} queries x {keys} keys do not fill {x.C} channels", "TM1402")

    def shape(self, x, *, heads, queries, keys):
        return Tensor("window_scores", (x.N, heads, queries, keys))

    def cost(self, inputs, outputs, *, heads, queries, keys):
        return Tally()

    def forward(self, x, *, inputs, heads, queries, keys):
        return call("unflatten", call("flatten", x, 1, 2), -1, f"({heads}, {queries}, {keys})")


op = PositionScores()
