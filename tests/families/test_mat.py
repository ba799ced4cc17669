"""MAT Transformer: emitted modules against the naive reference in float64, and the counts of family and ablations."""

import pytest
import torch

import tokenmix
from tests.families.keys import MAT as KEYS
from tests.families.keys import copy_weights, randomise
from tests.reference import mat
from tokenmix.compiler.report import exact_misses

CLOSE = 1e-9
SMALL = {"dim": 8, "depths": (1, 1, 2, 2), "heads": (1, 2, 4, 8)}
OTHERS = {
    "mat": {},
    "window_3": {"window": 3, "expand": 3, "mixer_from": 1},
    "everywhere": {"window": 4, "mixer_from": 0},
    "window_attention": {"abstract": False},
    "convolution": {"embedding": "convolution"},
    "merging": {"embedding": "merging"},
    "pure_mlp": {"mixer_from": 4, "hidden_conv": False},
}
# Most of the stages' maps do not divide by the window; at 16 x 16 the last one is a single token.
SIZES = [(64, 64), (96, 64), (64, 96), (100, 167), (29, 7), (16, 16), (224, 256)]
ABLATIONS = (
    "stages_1_4",
    "stages_2_4",
    "stage_4",
    "pure_mlp",
    "window_attention",
    "conv_embedding",
    "patch_merging",
)


def pair(arguments, **options):
    """Reference and emitted module with equal weights; no distance and no abstract token is zero."""
    given = {"C" if k == "dim" else k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
    model = tokenmix.load("mat" if given.pop("abstract", True) else "mat_2_window_attention", drop_path=0.0, **given)
    dense = options.get("features_only", False)
    reference = mat.MAT(**arguments, num_classes=11, dense=dense).double()
    module = tokenmix.build(model, **({} if dense else {"num_classes": 11}), **options).double()
    randomise(reference)
    with torch.no_grad():
        for name, tensor in reference.named_parameters():
            if name.endswith("token"):
                tensor.mul_(tensor[0].numel() ** 0.5)  # one row, and not a matrix with that fan-in
            if "offset_pw" in name:
                tensor.mul_(2)  # some look beyond the border
    down = f"down.{arguments.get('embedding', 'bilinear')}"
    return (
        reference,
        module,
        copy_weights(reference, module, [*KEYS, (r"^pe\.(\d)\.", lambda m: f"stages.{int(m[1]) + 1}.{down}.")]),
    )


def close(a, b):
    return ((a - b).norm() / b.norm()).item() < CLOSE


def images(batch, size, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("other", "size"),
    [("mat", s) for s in SIZES] + [(o, s) for o in OTHERS if o != "mat" for s in ((64, 96), (100, 167), (29, 7))],
)
def test_scores_and_maps_equal_the_reference_at_every_size(other, size):
    x = images(2, size)
    reference, module, _ = pair(SMALL | OTHERS[other])
    with torch.no_grad():
        assert close(module.eval()(x), reference.eval()(x))
    reference, module, _ = pair(SMALL | OTHERS[other], features_only=True)
    with torch.no_grad():
        ours, theirs = module.eval()(x), reference.eval()(x)
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


def test_mat_1_equals_the_reference_at_224():
    x = images(1, (224, 224))
    reference, module, _ = pair(mat.VARIANTS["1"])
    with torch.no_grad():
        assert close(module.eval()(x), reference.eval()(x))


@pytest.mark.parametrize("variant", mat.VARIANTS)
def test_every_variant_is_the_one_of_the_reference(variant):
    arguments = mat.VARIANTS[variant]
    parameters = tokenmix.load(f"mat_{variant}").plan.parameters
    assert (parameters["C"], tuple(parameters["depths"]), tuple(parameters["heads"])) == tuple(arguments.values())
    with torch.device("meta"):
        reference = mat.MAT(**arguments)
    assert tokenmix.load(f"mat_{variant}").cost().params == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize(("size", "train"), [((64, 96), True), ((64, 64), False), ((100, 167), True)])
@pytest.mark.parametrize("other", OTHERS)
def test_gradients_of_weights_and_image_equal_the_reference(size, train, other):
    reference, module, keys = pair(SMALL | OTHERS[other])
    direction = torch.randn(2, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for model in (reference, module):
        x = images(2, size).requires_grad_()
        (model.train(train)(x) * direction).sum().backward()
        gradients.append(x.grad)
    assert close(gradients[1], gradients[0])
    ours = dict(module.named_parameters())
    for name, parameter in reference.named_parameters():
        found = ours[keys[name]].grad.reshape(parameter.shape)
        # A bias in front of a norm over its own axis has no gradient but rounding.
        scale = max(parameter.grad.norm().item(), 1e-2)
        assert (found - parameter.grad).norm().item() < CLOSE * scale, name
    buffers = dict(module.named_buffers())
    for name, buffer in reference.named_buffers():
        assert torch.allclose(buffers[keys[name]].to(buffer.dtype), buffer, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("other", OTHERS)
def test_every_parameter_gets_a_gradient(other):
    _, module, _ = pair(SMALL | OTHERS[other])
    module.eval()(images(2, (256, 192))).square().sum().backward()
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if name.endswith(("qkv.bias", "fusion_kv.bias")):  # a softmax does not see what is the same for every key
            parts = grad.chunk(3 if "qkv" in name else 2)
            assert parts[-1].abs().max() > 1e-9 and (len(parts) < 3 or parts[0].abs().max() > 1e-12), name
        else:
            assert grad.abs().max().item() > 1e-9, name


def test_an_image_is_scored_alone_as_in_a_batch():
    _, module, _ = pair(SMALL)
    x = images(8, (100, 167))
    with torch.no_grad():
        together = module.eval()(x)
        assert all(close(module(x[i : i + 1]), together[i : i + 1]) for i in range(8))
        others = torch.cat([x[:1], 10 * images(7, (100, 167), seed=1)])
        assert close(module(others)[:1], together[:1])


def test_every_window_hears_of_every_other():
    """A change in one window moves every token behind MAT attention, and behind the ablation's only its own."""
    for base, heard in (("mat", True), ("mat_2_window_attention", False)):
        model = tokenmix.load(base, C=8, depths=[1, 1, 1, 1], heads=[1, 2, 4, 8])
        attention = tokenmix.build(model).double().stages[2].blocks[0].attn
        randomise(attention)
        x = torch.randn(1, 14, 21, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = x.clone()
        y[:, :7, :7] *= 2
        with torch.no_grad():
            moved = (attention(y) - attention(x)).abs().amax(-1)[0] > 1e-9
        assert bool(moved[:7, :7].all()) and bool(moved.all()) == heard and bool(moved[7:, 7:].any()) == heard


def test_sampling_starts_at_the_regular_grid():
    """Fresh models have no distances: the embedding is a strided depth-wise convolution and a 1x1 one."""
    module = tokenmix.build("mat", C=8, depths=[1, 1, 1, 1], heads=[1, 2, 4, 8]).double().eval()
    for stage in (1, 2, 3):
        down = module.stages[stage].down.bilinear
        assert not down.offset_proj.weight.any() and down.offset_conv.weight.any() and down.proj.weight.any()
        x = images(2, (9, 12)).permute(0, 2, 3, 1).repeat(1, 1, 1, 24)[..., : down.norm.normalized_shape[0]]
        with torch.no_grad():
            assert close(down(x), down.proj_norm(down.proj(down.conv(down.norm(x)))))
    module.train()(images(2, (128, 128))).square().sum().backward()
    assert all(module.stages[i].down.bilinear.offset_proj.weight.grad.abs().max() > 0 for i in (1, 2, 3))


@pytest.mark.parametrize("name", [*(f"mat_{v}" for v in mat.VARIANTS), *(f"mat_2_{a}" for a in ABLATIONS)])
def test_every_exact_integer_is_met(name):
    model = tokenmix.load(name)
    assert model.spec.exact and exact_misses(model) == []


def test_a_half_precision_model_runs_and_is_finite():
    _, module, _ = pair(SMALL)
    x = images(2, (64, 64)).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert module.float().eval()(x).isfinite().all()
    module.bfloat16()(x.bfloat16()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
