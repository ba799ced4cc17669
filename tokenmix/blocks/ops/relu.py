from tokenmix.blocks.patterns import Activation


class Relu(Activation):
    """The rectifier, max(x, 0)."""

    signature_text = "relu(x)"
    tally = "relu"
    code = "F.relu"


op = Relu()
