"""Ablations whose blocks are their own, against naive variants of the references: outputs and gradients in float64."""

import pytest
import torch
from torch import nn

import tokenmix
from tests.families.keys import ATMNET, MIXFORMER, copy_weights, randomise
from tests.families.test_numerics import close, images
from tests.reference import ablations

SMALL_MIXFORMER = {"channels": [16, 32, 64, 128], "depths": [2, 2, 1, 1], "heads": [1, 2, 4, 4], "drop_path": 0.0}
SMALL_ATMNET = {
    "channels": [8, 16, 24, 32], "depths": [2, 2, 3, 2], "expand": [2, 2, 2, 2], "interval": 2, "drop_path": 0.0
}  # fmt: skip
SUCCESSIVE = [(r"\.attn\.dwconv\.0\.", ".attn.dwconv."), (r"\.attn\.dwconv\.1\.", ".attn.dwconv_norm."), *MIXFORMER]


def mixformer(reference, **options):
    names = {"channels": "dims"}
    return reference(**{names.get(k, k): v for k, v in SMALL_MIXFORMER.items()}, num_classes=5, **options)


def atmnet(reference, share):
    names = {"depths": "blocks", "expand": "mlp_ratios", "interval": "offset_interval"}
    options = {names.get(k, k): v for k, v in SMALL_ATMNET.items()}
    return reference(**options, channels_per_offset=share, num_classes=5)


CASES = {
    "mixformer_b1_successive": (lambda: mixformer(ablations.Successive), SMALL_MIXFORMER, SUCCESSIVE),
    "mixformer_b1_shifted": (lambda: mixformer(ablations.Shifted), SMALL_MIXFORMER, MIXFORMER),
    "atmnet_xt_a_shared": (lambda: atmnet(ablations.PlaneATMNet, [2, 4, 4, 8]), SMALL_ATMNET, ATMNET),
    "atmnet_xt_a": (lambda: atmnet(ablations.PlaneATMNet, [1, 1, 1, 1]), SMALL_ATMNET, ATMNET),
    "atmnet_xt_b_shared": (lambda: atmnet(ablations.ThreeTapATMNet, [2, 4, 4, 8]), SMALL_ATMNET, ATMNET),
    "atmnet_xt_b": (lambda: atmnet(ablations.ThreeTapATMNet, [1, 1, 1, 1]), SMALL_ATMNET, ATMNET),
}


# At 126 x 93 windows are padded along both sides, and one map is a single window wide and two windows high.
@pytest.mark.parametrize("size", [(64, 96), (126, 93)])
@pytest.mark.parametrize("name", CASES)
def test_scores_and_gradients_equal_the_naive_variant(name, size):
    make, settings, rules = CASES[name]
    reference = make().double().eval()
    module = tokenmix.build(tokenmix.load(name, **settings), num_classes=5).double().eval()
    randomise(reference)
    keys = copy_weights(reference, module, rules)
    x = images(2, size)
    results = []
    for model in (reference, module):
        model.zero_grad()
        scores = model(x)
        scores.square().sum().backward()
        results.append((scores, dict(model.named_parameters())))
    (theirs, wanted), (ours, got) = results
    assert close(ours, theirs)
    for key, parameter in wanted.items():
        other = got[keys[key]].grad.reshape(parameter.shape)
        assert (other - parameter.grad).norm().item() < max(1e-8 * parameter.grad.norm().item(), 1e-10), key


@pytest.mark.parametrize("choice", ["channel", "spatial", "none"])
def test_a_gate_that_is_left_out_is_a_gate_of_one(choice):
    reference = mixformer(ablations.Gated, gates={choice}).double().eval()
    module = tokenmix.build(tokenmix.load("mixformer_b1", **SMALL_MIXFORMER, interactions=choice), num_classes=5)
    randomise(reference)
    copy_weights(reference, module.double().eval(), MIXFORMER)
    x = images(1, (64, 96))
    with torch.no_grad():
        assert close(module(x), reference(x))


def test_only_the_channel_gate_wants_a_multiple_of_8():
    settings = SMALL_MIXFORMER | {"channels": [20, 36, 68, 132], "heads": [1, 2, 2, 2]}
    found = {
        choice: [f.message for f in tokenmix.load("mixformer_b1", **settings, interactions=choice).findings]
        for choice in ("both", "channel", "spatial", "none")
    }
    wanted = ["block `mixing_attention`: the channel gate reduces the channels by 8"]
    assert found == {"both": wanted, "channel": wanted, "spatial": [], "none": []}


def test_a_model_without_position_encoders_is_one_whose_encoders_give_nothing():
    settings = SMALL_ATMNET | {"classes": 5}
    plain = tokenmix.build(tokenmix.load("atmnet_t", **settings)).double().eval()
    module = tokenmix.build(tokenmix.load("atmnet_t_no_position", **settings)).double().eval()
    randomise(plain)
    state = plain.state_dict()
    encoders = {k for k in state if ".pos." in k}
    assert encoders and set(module.state_dict()) == set(state) - encoders
    with torch.no_grad():
        for key in encoders:
            state[key].zero_()
        module.load_state_dict({k: v for k, v in state.items() if k not in encoders})
        x = images(1, (64, 96))
        assert close(module(x), plain(x))


def test_shifting_changes_the_scores():
    reference, plain = mixformer(ablations.Shifted), mixformer(ablations.mixformer.MixFormer)
    for model in (reference, plain):
        nn.Module.double(model).eval()
        randomise(model)
    x = images(1, (64, 96))
    with torch.no_grad():
        assert not close(reference(x), plain(x))
