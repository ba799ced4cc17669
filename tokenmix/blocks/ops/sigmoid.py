from tokenmix.blocks.patterns import Activation


class Sigmoid(Activation):
    """The logistic function, 1 / (1 + exp(-x))."""

    signature_text = "sigmoid(x)"
    tally = "activation"
    code = "torch.sigmoid"


op = Sigmoid()
