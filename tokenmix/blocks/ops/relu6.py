from tokenmix.blocks.patterns import Activation


class Relu6(Activation):
    """The rectifier with a ceiling, min(max(x, 0), 6).

    Source: MobileNetV2 (Sandler et al. 2018), section 3.3.
    """

    signature_text = "relu6(x)"
    tally = "relu"
    code = "F.relu6"


op = Relu6()
