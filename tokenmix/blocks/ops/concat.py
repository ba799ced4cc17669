from tokenmix.blocks.cost import Tally
from tokenmix.blocks.op import KINDS, Op


class Concat(Op):
    """Join values along the channels, in the order written."""

    signature_text = "concat(parts...: map | tokens | windows | vector)"

    def check(self, *parts):
        first = parts[0]
        for part in parts[1:]:
            if part.kind != first.kind:
                raise self.mistake(f"cannot join a {first.kind} and a {part.kind}: {first} and {part}", "TM1401")
            for letter, p, q in zip(KINDS[first.kind], first.dims, part.dims, strict=True):
                if letter != "C" and p != q:
                    raise self.mistake(f"the values differ in {letter}: {first} and {part}", "TM1402")

    def shape(self, *parts):
        return parts[0].having(C=sum(part.C for part in parts[1:]) + parts[0].C)

    def cost(self, inputs, outputs):
        return Tally()

    def forward(self, *parts, inputs):
        return f"torch.cat(({', '.join(parts)}), dim=-1)"


op = Concat()
