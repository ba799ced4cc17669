from tokenmix.blocks.patterns import Activation


class Gelu(Activation):
    """The exact (erf) Gaussian error linear unit (Hendrycks and Gimpel 2016)."""

    signature_text = "gelu(x)"
    tally = "gelu"
    code = "F.gelu"


op = Gelu()
