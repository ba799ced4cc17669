from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor, size


class OutlookAttention(Op):
    """Mix the values of the kernel x kernel window around every `stride`-th position with weights read off `logits`.

    Channels of the logits run over heads, then places of the window to be filled, then places that are read, row by
    row: channel (head * kernel**2 + i) * kernel**2 + j. With w = softmax over j, place i of head h is the sum over j of
    w[h, i, j] * v[h, j]; heads share the channels of v. Values outside of the map are zero and take part; windows add
    up where they overlap, and what they make outside of the map is dropped.

    It is `position_scores |> softmax`, `unfold(kernel, stride, kernel // 2)`, `weighted_sum` and `fold` in one step,
    which need not hold the windows.
    Source: VOLO (Yuan et al. 2021), section 3.1.
    """

    signature_text = "outlook_attention(logits: map, v: map; heads: int, kernel: odd, stride: int = 1)"
    helpers = ("outlook_attention",)

    def check(self, logits: Tensor, v: Tensor, *, heads: int, kernel: int, stride: int) -> None:
        if heads < 1 or not 1 <= stride <= kernel:
            raise self.mistake(f"needs a head and a stride of 1 to {kernel}, the kernel; got {heads} and {stride}")
        if v.C % heads:
            raise self.mistake(f"{v.C} channels do not split evenly over {heads} heads")
        expected = Tensor("map", (heads * kernel**4, *(-(-side // stride) for side in (v.H, v.W))))
        if logits != expected:
            raise self.mistake(
                f"windows of {kernel}x{kernel} places, one every {stride}, take logits of {expected}, got {logits}",
                "TM1402",
            )

    def shape(self, logits, v, *, heads, kernel, stride):
        return v

    def cost(self, inputs, outputs, *, heads, kernel, stride):
        logits, v = inputs
        places = logits.N * kernel**2 * v.C
        return Tally(softmax=size(logits), macs_attention=places * kernel**2, elementwise=places)

    def forward(self, logits, v, *, inputs, heads, kernel, stride):
        return f"outlook_attention({logits}, {v}, {heads}, {kernel}, {stride})"


op = OutlookAttention()
