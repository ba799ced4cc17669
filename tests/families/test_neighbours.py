"""Well-known backbones written in the language against timm's: parameters, counts, scores and gradients."""

import re

import pytest
import torch
from torch.nn import functional as F

import tokenmix
from tests.families import neighbour_keys as keys
from tests.families.timm_models import reference_package, timm_model, timm_parameters, torchvision_model

# Ours -> timm's name.
MODELS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "mobilenetv2": "mobilenetv2_100",
    "deit_t": "deit_tiny_patch16_224",
    "deit_s": "deit_small_patch16_224",
    "deit_b": "deit_base_patch16_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "pvtv2_b0": "pvt_v2_b0",
    "pvtv2_b1": "pvt_v2_b1",
    "pvtv2_b2": "pvt_v2_b2",
    "convnext_t": "convnext_tiny",
    "poolformer_s12": "poolformer_s12",
}
# The small model of each family -> its rules, and where the spec must be told what timm does otherwise.
SMALL = {
    "resnet18": (keys.RESNET, {}),
    "resnet50": (keys.RESNET, {}),
    "mobilenetv2": (keys.MOBILENET, {}),
    "deit_t": (keys.VIT, {}),
    "swin_t": (keys.SWIN, {}),
    "pvtv2_b0": (keys.PVT, {}),
    "convnext_t": (keys.CONVNEXT, {}),
    "poolformer_s12": (keys.POOLFORMER, {}),
}
CONVOLUTIONAL = ("resnet18", "resnet50", "mobilenetv2", "pvtv2_b0", "convnext_t", "poolformer_s12")
CLOSE = 1e-9  # relative, in float64: sums run in another order, nothing else differs


def names_of(key, rules):
    """The key or keys that a foreign key stands for."""
    names = [key]
    for pattern, replacement in rules:
        if isinstance(replacement, tuple) and re.search(pattern, key):
            return list(replacement)
        if isinstance(replacement, str):
            names = [re.sub(pattern, replacement, name, count=1) for name in names]
    return names


def shared_out(tensor, shapes):
    """A tensor's numbers in order, as tensors of these shapes; shapes may write the ones of a kernel or not."""
    parts = tensor.flatten().split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def translated(state, rules, wanted):
    """Entries of a foreign state dict under our keys and in our shapes; every entry of both finds its partner."""
    ours = {}
    for key, tensor in state.items():
        names = names_of(key, rules)
        ours |= zip(names, shared_out(tensor, [wanted[name].shape for name in names]), strict=True)
    assert ours.keys() == wanted.keys()
    return ours


def ours_of(name, reference, rules, **parameters):
    with torch.device("meta"):
        module = tokenmix.build(tokenmix.load(name, **parameters), num_classes=11)
    module = module.double().to_empty(device="cpu")
    state = {k: v for k, v in reference.state_dict().items() if "relative_position_index" not in k}
    module.load_state_dict(translated(state, rules, module.state_dict()))
    return module


def pair(name, **options):
    rules, parameters = SMALL[name]
    reference = timm_model(MODELS[name], **options)
    return reference, ours_of(name, reference, rules, **parameters)


def images(size, batch=1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def same_gradients(reference, module, rules, x):
    """Scores, gradients of image and weights, and running statistics, of two models in training mode."""
    direction = torch.randn(len(x), 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores, of_images = [], []
    for model in (reference, module):
        leaf = x.clone().requires_grad_()
        scores.append(model.train()(leaf))
        (scores[-1] * direction).sum().backward()
        of_images.append(leaf.grad)
    assert distance(scores[1], scores[0]) < CLOSE
    assert distance(of_images[1], of_images[0]) < 1e-8
    ours = dict(module.named_parameters())
    theirs = translated({n: p.grad for n, p in reference.named_parameters()}, rules, ours)
    for name, gradient in theirs.items():
        # A bias in front of a norm over its own axis has no gradient but rounding.
        assert (ours[name].grad - gradient).norm() < max(1e-8 * gradient.norm(), 1e-9), name
    buffers = dict(module.named_buffers())
    foreign = {n: b for n, b in reference.named_buffers() if "running_" in n}
    running = {n: b for n, b in buffers.items() if "running_" in n}
    for name, buffer in translated(foreign, rules, running).items():
        torch.testing.assert_close(running[name], buffer, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_timm(name):
    model = tokenmix.load(name)
    assert model.findings == ()
    params = model.cost().params
    assert params == timm_parameters(MODELS[name])
    assert [row.values["params"] for row in model.spec.exact] == [params]


@pytest.mark.parametrize("name", SMALL)
def test_scores_are_those_of_timm(name):
    reference, module = pair(name)
    x = images((224, 224))
    with torch.no_grad():
        assert distance(module.eval()(x), reference.eval()(x)) < CLOSE


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@pytest.mark.parametrize("size", [(96, 64), (75, 109)])
def test_scores_are_those_of_timm_at_other_sizes(name, size):
    reference, module = pair(name)
    x = images(size, batch=2)
    with torch.no_grad():
        assert distance(module.eval()(x), reference.eval()(x)) < CLOSE


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_gradients_are_those_of_timm(name):
    reference, module = pair(name)
    same_gradients(reference, module, SMALL[name][0], images((64, 96), batch=2))


def test_gradients_of_a_transformer_on_tokens_are_those_of_timm():
    reference = timm_model("deit_tiny_patch16_224", img_size=64)
    module = ours_of("deit_t", reference, keys.VIT, grid=[4, 4])
    same_gradients(reference, module, keys.VIT, images((64, 64), batch=2))


def test_positions_are_resized_as_in_timm():
    reference = timm_model("deit_tiny_patch16_224", img_size=64, dynamic_img_size=True)
    module = ours_of("deit_t", reference, keys.VIT, grid=[4, 4])
    x = images((96, 48))
    with torch.no_grad():
        # timm resizes in single precision.
        assert distance(module.eval()(x), reference.eval()(x)) < 1e-5


# The first two sizes pad every stage; the last leaves a stage of one window one way and of two the other.
@pytest.mark.parametrize("size", [(100, 188), (64, 260), (224, 448)])
def test_shifted_windows_are_those_of_torchvision(size):
    reference = torchvision_model("swin_t")
    module = ours_of("swin_t", reference, keys.SWIN_TORCHVISION)
    with torch.no_grad():
        assert distance(module.eval()(images(size)), reference.eval()(images(size))) < CLOSE


def test_gradients_of_shifted_windows_are_those_of_torchvision():
    reference = torchvision_model("swin_t")
    module = ours_of("swin_t", reference, keys.SWIN_TORCHVISION)
    same_gradients(reference, module, keys.SWIN_TORCHVISION, images((64, 96), batch=2))


def test_the_authors_head_norms_the_map_and_then_averages():
    _, timms = pair("poolformer_s12")
    module = tokenmix.build("poolformer_s12", num_classes=11, norm_after_mean=False).double().eval()
    module.load_state_dict(timms.state_dict())
    maps = []
    module.head.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0].permute(0, 3, 1, 2)))
    with torch.no_grad():
        scores = module(images((64, 96)))
        norm = module.head.norm
        mean = F.group_norm(maps[0], 1, norm.weight, norm.bias).mean((2, 3))
        assert distance(scores, module.head.classifier(mean)) < CLOSE


# What fvcore sees of timm's model; attention in its parts, since it has no rule for the fused call.
@pytest.mark.parametrize("name", SMALL)
def test_multiply_adds_are_what_fvcore_counts_of_timm(name):
    fvcore = pytest.importorskip("fvcore.nn")
    timm = reference_package("timm")
    fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        reference = timm.create_model(MODELS[name]).eval()
    finally:
        timm.layers.set_fused_attn(fused)
    with torch.no_grad():
        analysis = fvcore.FlopCountAnalysis(reference, torch.zeros(1, 3, 224, 224))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        seen = analysis.by_operator()
    counted = sum(int(seen[operator]) for operator in ("conv", "linear", "matmul"))
    model = tokenmix.load(name)
    assert model.cost()["mac"] == counted
    assert [row.values["mac"] for row in model.spec.exact] == [counted]


# MixFormer, table 12: width, blocks, heads, entry, tail -> parameters, multiply-adds.
MIXINGS = {
    "resnet50_mixing": [
        (512, 3, 32, "merge2", "projected", 22059083, 3872560736),
        (512, 4, 32, "conv1", "pooled", 22219180, 3915446400),
        (512, 4, 32, "conv1", "projected", 23643820, 3948327040),
        (640, 2, 40, "merge2", "projected", 23128986, 3924473168),
        (1024, 1, 64, "conv1", "pooled", 23214313, 3938735168),
    ],
    "mobilenetv2_mixing": [
        (160, 5, 10, "merge2", "projected", 3657475, 300378930),
        (160, 4, 10, "merge2", "projected", 3344324, 285140520),
        (320, 1, 20, "merge2", "projected", 3597541, 297275860),
        (192, 3, 12, "merge2", "projected", 3493015, 292298212),
    ],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in MIXINGS.items() for row in rows])
def test_every_setting_of_the_mixed_networks_has_its_integers(name, row):
    width, blocks, heads, entry, tail, params, macs = row
    model = tokenmix.load(name, width=width, blocks=blocks, heads=heads, entry=entry, tail=tail)
    cost = model.cost()
    assert (cost.params, cost["mac"]) == (params, macs)


@pytest.mark.parametrize("name", MIXINGS)
def test_a_mixed_network_shares_the_trunk_of_the_plain_one(name):
    plain = tokenmix.build(tokenmix.load(name.removesuffix("_mixing"))).state_dict()
    mixed = tokenmix.build(name, num_classes=11)
    last = f"stages.{len(mixed.stages) - 1}."
    trunk = {k: v.shape for k, v in mixed.state_dict().items() if not k.startswith((last, "head."))}
    assert trunk == {k: plain[k].shape for k in trunk} and len(trunk) > 100
    for entry in ("conv1", "conv3"):
        other = tokenmix.build(tokenmix.load(name, entry=entry, tail="pooled"), num_classes=11).eval()
        with torch.no_grad():
            assert other(torch.zeros(1, 3, 64, 64)).shape == (1, 11)
