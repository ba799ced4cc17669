from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import Op, Tensor

_ROWS = ("tokens", "windows")


class ConcatTokens(Op):
    """Join rows of tokens, in the order written.

    A vector or a `parameter` is one token, repeated for every image and window: `concat_tokens(class_token, x)`.
    Source: the class token of An Image is Worth 16x16 Words (Dosovitskiy et al. 2021), equation 1.
    """

    signature_text = "concat_tokens(parts...: tokens | windows | vector | weight)"
    helpers = ("concat_tokens",)

    def check(self, *parts: Tensor) -> None:
        rows = [p for p in parts if p.kind in _ROWS]
        if all(p.kind == "weight" for p in parts):
            raise self.mistake("parameters alone make no tokens: join them to tokens of an image", "TM1401")
        if len({p.kind for p in rows}) > 1:
            raise self.mistake("cannot join tokens and windows: cut the tokens into windows first", "TM1401")
        for part in parts[1:]:
            if part.C != parts[0].C:
                raise self.mistake(f"the values differ in channels: {parts[0]} and {part}", "TM1402")
        if len({r.n for r in rows if r.kind == "windows"}) > 1:
            raise self.mistake(f"the values differ in windows: {' and '.join(str(r) for r in rows)}", "TM1402")

    def shape(self, *parts):
        count = sum(p.N if p.kind in _ROWS else 1 for p in parts)
        rows = [p for p in parts if p.kind in _ROWS]
        return rows[0].having(N=count) if rows else Tensor("tokens", (count, parts[0].C))

    def cost(self, inputs, outputs):
        return Tally()

    def forward(self, *parts, inputs):
        return f"concat_tokens({', '.join(parts)})"


op = ConcatTokens()
