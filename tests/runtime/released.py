"""Checkpoints as the authors of MixFormer and ATMNet publish them, made from the naive references."""

import numpy
from torch import nn

from tests.reference import atmnet, mixformer

SMALL = {
    "mixformer": {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "heads": (1, 2, 4, 8)},
    "atmnet": {
        "channels": (16, 32, 40, 64), "blocks": (2, 2, 4, 3), "mlp_ratios": (4, 3, 2, 2),
        "channels_per_offset": (2, 4, 4, 8), "offset_interval": 2,
    },
}  # fmt: skip
# The same models in the words of our specs.
OURS = {
    "mixformer": {"C": 16, "depths": [1, 1, 2, 1], "heads": [1, 2, 4, 8]},
    "atmnet": {
        "channels": [16, 32, 40, 64], "depths": [2, 2, 4, 3], "expand": [4, 3, 2, 2], "share": [2, 4, 4, 8],
        "interval": 2,
    },
}  # fmt: skip
CLASSES = {"mixformer": mixformer.MixFormer, "atmnet": atmnet.ATMNet}


def paddle_state(reference: nn.Module, window: int = 7) -> dict:
    """MixFormer's weights in Paddle's conventions: numpy, linear layers [in, out], other names of statistics."""
    linear = {name for name, module in reference.named_modules() if isinstance(module, nn.Linear)}
    state = {}
    for key, tensor in reference.state_dict().items():
        owner, _, last = key.rpartition(".")
        if last == "num_batches_tracked":
            continue
        array = tensor.numpy()
        if owner in linear and last == "weight":
            array = numpy.ascontiguousarray(array.T)
        state[{"running_mean": f"{owner}._mean", "running_var": f"{owner}._variance"}.get(last, key)] = array
        if last == "relative_position_bias_table":
            index = numpy.array(mixformer.relative_position_index(window))
            state[f"{owner}.relative_position_index"] = index
    state["StructuredToParameterName@@"] = {key: f"param_{i}.w_0" for i, key in enumerate(state)}
    return state
