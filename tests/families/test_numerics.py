"""Emitted modules against the naive references: outputs and gradients in float64, padded and odd sizes included."""

import pytest
import torch

import tokenmix
from tests.families.keys import ATMNET, MIXFORMER, copy_weights, randomise
from tests.reference import atmnet, mixformer

FAMILIES = {
    "mixformer": (mixformer.MixFormer, mixformer.VARIANTS, MIXFORMER),
    "atmnet": (atmnet.ATMNet, atmnet.VARIANTS, ATMNET),
}
VARIANTS = [(family, variant) for family, (_, variants, _) in FAMILIES.items() for variant in variants]
# A plain size, and one that is neither square nor a multiple of the window in any stage.
SIZES = {
    "mixformer": [(224, 224), (256, 320), (254, 223), (61, 95)],
    "atmnet": [(224, 224), (227, 130), (250, 333), (35, 51)],
}
# Relative difference allowed in float64; sums run in another order, nothing else differs.
CLOSE = 1e-9


def pair(family, variant, **options):
    reference_class, variants, rules = FAMILIES[family]
    dense = options.get("features_only", False)
    with torch.device("meta"):
        reference = reference_class(
            **{**variants[variant], "num_classes": options.get("num_classes", 1000), "dense": dense}
        )
        module = tokenmix.build(f"{family}_{variant.lower()}", **options)
    reference, module = (m.double().to_empty(device="cpu") for m in (reference, module))
    randomise(reference)
    keys = copy_weights(reference, module, rules)
    return reference, module, keys


def close(a, b):
    return ((a - b).norm() / b.norm()).item() < CLOSE


def images(batch, size, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_scores_equal_the_reference_at_every_variant(family, variant):
    reference, module, _ = pair(family, variant, num_classes=11)
    x = images(1, (224, 224) if variant == "B1" else SIZES[family][3])
    with torch.no_grad():
        assert close(module.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(("family", "variant"), [("mixformer", "B0"), ("atmnet", "xT")])
@pytest.mark.parametrize("which", range(4))
def test_scores_and_maps_equal_the_reference_at_every_size(family, variant, which):
    size = SIZES[family][which]
    x = images(2, size)
    reference, module, _ = pair(family, variant, num_classes=11)
    with torch.no_grad():
        assert close(module.eval()(x), reference.eval()(x))
    reference, module, _ = pair(family, variant, features_only=True)
    with torch.no_grad():
        ours, theirs = module.eval()(x), reference.eval().forward_features(x)
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("family", "variant"), [("mixformer", "B0"), ("atmnet", "xT")])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("which", [1, 3])
def test_gradients_of_weights_and_image_equal_the_reference(family, variant, train, which):
    reference, module, keys = pair(family, variant, num_classes=11)
    torch.manual_seed(1)
    direction = torch.randn(2, 11, dtype=torch.float64)
    gradients = []
    for model in (reference, module):
        x = images(2, SIZES[family][which]).requires_grad_()
        # Drop path is off (reference rate 0): batch norm is what training changes.
        for layer in model.modules():
            if hasattr(layer, "rate"):
                layer.rate = 0.0
        (model.train(train)(x) * direction).sum().backward()
        gradients.append(x.grad)
    assert close(gradients[1], gradients[0])
    ours = dict(module.named_parameters())
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None, name
        other = ours[keys[name]].grad.reshape(parameter.shape)
        scale = max(parameter.grad.norm().item(), 1e-12)
        # A bias in front of a norm over its own axis has no gradient but rounding.
        assert (other - parameter.grad).norm().item() < max(1e-8 * scale, 1e-10), name
    for name, buffer in reference.named_buffers():
        assert torch.allclose(
            dict(module.named_buffers())[keys[name]].to(buffer.dtype), buffer, rtol=1e-9, atol=1e-12
        ), name


@pytest.mark.parametrize(("family", "variant"), [("mixformer", "B0"), ("atmnet", "xT")])
def test_an_image_is_scored_alone_as_in_a_batch(family, variant):
    _, module, _ = pair(family, variant, num_classes=11)
    x = images(8, SIZES[family][3])
    with torch.no_grad():
        together = module.eval()(x)
        assert all(close(module(x[i : i + 1]), together[i : i + 1]) for i in range(8))


@pytest.mark.parametrize(("family", "variant"), [("mixformer", "B0"), ("atmnet", "xT")])
def test_no_classes_gives_the_features_that_the_classifier_reads(family, variant):
    _, module, _ = pair(family, variant, num_classes=11)
    bare = tokenmix.build(f"{family}_{variant.lower()}", num_classes=0).double()
    state = {k: v for k, v in module.state_dict().items() if not k.startswith("head.classifier")}
    bare.load_state_dict(state)
    x = images(2, SIZES[family][3])
    with torch.no_grad():
        assert close(module.head.classifier(bare.eval()(x)), module.eval()(x))
