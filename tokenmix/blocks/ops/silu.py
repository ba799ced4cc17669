from tokenmix.blocks.patterns import Activation


class Silu(Activation):
    """The sigmoid linear unit, x * sigmoid(x)."""

    signature_text = "silu(x)"
    tally = "activation"
    code = "F.silu"


op = Silu()
