"""Modules folded for inference equal the ones they were made from, and hold fewer layers."""

import copy
import inspect
import pickle
import re
import sys

import pytest
import torch
from torch import nn

import tokenmix
from tests.families.keys import randomise
from tokenmix.blocks.kernels.channels_last import FusedConv2d, FusedLinear, FusedPointwise
from tokenmix.compiler.passes import Fold, inference_model
from tokenmix.compiler.spec import shipped_specs
from tokenmix.compiler.spec_reader import read_spec

# Small members of every family, each with what its own layers need.
MODELS = {
    "mixformer_b0": {"depths": [1, 1, 1, 1]},
    "atmnet_xt": {"depths": [2, 2, 2, 2]},
    "emsnet_xxtiny": {"depths": [1, 1, 1, 1]},
    "mat_1": {"depths": [1, 1, 1, 1]},
    "partialformer_b0": {"depths": [1, 1, 1, 1]},
    "resnet18": {},
    "mobilenetv2": {},
}


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(name, **settings):
    module = tokenmix.build(name, **settings).double().eval()
    randomise(module)
    return module


def same(module, folded, size=(64, 96), channels=3):
    images = torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = module(images), folded(images)
    for x, y in zip(a if isinstance(a, list) else [a], b if isinstance(b, list) else [b], strict=True):
        assert (x - y).abs().max() <= 1e-11 * x.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_folded_module_equals_the_trained_one(name):
    module = trained(name, num_classes=7, **MODELS[name])
    before = {k: v.clone() for k, v in module.state_dict().items()}
    folded = tokenmix.for_inference(module)
    same(module, folded)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in module.parameters())
    norms = [sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in part.modules()) for part in (module, folded)]
    assert norms[1] < norms[0] or norms == [0, 0]


@pytest.mark.parametrize("name", ["mixformer_b0", "atmnet_xt"])
def test_dense_backbone_is_folded_too(name):
    module = trained(name, features_only=True, **MODELS[name])
    same(module, tokenmix.for_inference(module))


def test_an_ordinary_convnet_keeps_no_norm():
    folded = tokenmix.for_inference(trained("resnet18"))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())


def test_build_folds_at_once_and_what_it_builds_can_be_copied():
    folded = tokenmix.build("mixformer_b0", for_inference=True, depths=[1, 1, 1, 1])
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())  # 23 in training
    assert not folded.training
    images = torch.randn(1, 3, 64, 64)
    for twin in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        torch.testing.assert_close(twin(images), folded(images))
    assert folded.to(torch.bfloat16)(images.bfloat16()).isfinite().all()


def test_wrappers_are_left_out():
    module = trained("atmnet_xt", **MODELS["atmnet_xt"])
    for wrapped in (torch.compile(module), nn.DataParallel(module)):
        same(module, tokenmix.for_inference(wrapped))


SPEC = """\
tokenmix: 1
name: probe
input: [6, 9, 11]
stages:
  - body: probe_block()
definitions: |
  block probe_block(x):
"""

# Lines of a block -> the folds they allow.
CASES = {
    "return x |> a: conv(4, 3, bias = false) |> n: batch_norm |> gelu": [Fold("n", "a", True)],
    "return x |> a: dwconv(3) |> n: batch_norm": [Fold("n", "a", True)],
    "return x |> a: dwconv_transpose(3, 2) |> n: batch_norm": [Fold("n", "a", True)],
    "return a: linear(x; 4, false) |> n: batch_norm": [Fold("n", "a", True)],
    "return x |> n: batch_norm |> a: conv(4, kernel = 2, stride = 2, padding = 0)": [Fold("n", "a", False)],
    "return x |> n: layer_norm |> a: linear(4)": [Fold("n", "a", False)],
    "return x |> n: batch_norm |> a: pointwise(4) |> m: batch_norm": [Fold("n", "a", False), Fold("m", "a", True)],
    "return x + (x |> mean |> a: pointwise(6) |> n: batch_norm)": [Fold("n", "a", True)],
    # Zeros of the padding, other readers, and what stands between forbid it.
    "return x |> n: batch_norm |> a: conv(4, 3)": [],
    "return x |> n: batch_norm |> a: dwconv(3)": [],
    "return x |> a: conv(4, 3) |> gelu |> n: batch_norm": [],
    "y = x |> a: conv(6, 3)\n    return y + (y |> n: batch_norm)": [],
    "return x |> n: batch_norm |> a: conv(6, kernel = 1, padding = 0, groups = 2)": [],
    "return x |> n: layer_norm(affine = false) |> a: linear(4, bias = false)": [],
    # Of an `if`, the arm that is taken.
    "if C > 3:\n        x = x |> n: batch_norm |> a: pointwise(C)\n"
    "    else:\n        x = x |> a: pointwise(C) |> n: batch_norm\n    return x": [Fold("n", "a", False)],
    "if C > 9:\n        x = x |> n: batch_norm |> a: pointwise(C)\n"
    "    else:\n        x = x |> a: pointwise(C) |> gelu |> n: batch_norm\n    return x": [],
    # Another image could take the other arm.
    "x = x |> n: batch_norm\n    y = x |> a: pointwise(C)\n    if H > 3:\n        y = y + x\n    return y": [],
    "h = H\n    x = x |> a: conv(C, 3) |> n: batch_norm\n    if h > 99:\n        x = gelu(x)\n    return x": [],
    # Every reader takes it in, behind whatever hands its channels on.
    "y = x |> n: batch_norm\n    return (y |> a: linear(4)) + (y |> b: linear(4))": [
        Fold("n", "a", False),
        Fold("n", "b", False),
    ],
    "y = x |> n: batch_norm\n    return (y |> a: linear(6)) + y": [],
    "y = x |> a: linear(5) |> n: layer_norm\n    return concat(x, y, x |> m: batch_norm) |> b: linear(4)": [
        Fold("n", "b", False, 6),
        Fold("m", "b", False, 11),
    ],
    "return concat(x, x |> n: batch_norm) |> a: conv(4, 3)": [],
    "return x |> n: batch_norm |> crop(H // 2, W // 2) |> drop_path(0.1) |> a: linear(4)": [Fold("n", "a", False)],
    "return x |> n: batch_norm |> pad_to(2) |> a: linear(4)": [],
    "module a = linear(6)\n    return x |> a |> n: batch_norm |> a": [],
    "for j in 0..2:\n        x = x |> a: conv(C, 3, bias = false) |> n: batch_norm\n    return x": [
        Fold("n", "a", True)
    ],
    "for i in 0..2:\n        for j in 0..2:\n            x = x |> a: conv(C, 3) |> n: batch_norm\n    return x": [
        Fold("n", "a", True)
    ],
}


def _labels(fold):
    """A fold by the labels in the block, without the rounds of loops."""
    norm, layer = (re.sub(r"^stages\.0\.body\.|\.[\d_]+", "", path) for path in (fold.norm, fold.layer))
    return Fold(norm, layer, fold.behind, fold.first)


@pytest.mark.parametrize("lines", CASES)
def test_norm_is_folded_exactly_where_it_can_be(lines, tmp_path):
    path = tmp_path / "probe.yaml"
    path.write_text(SPEC + "".join(f"      {line}\n" for line in lines.replace("\n    ", "\n").split("\n")))
    model = tokenmix.load(path)
    assert model.findings == ()
    folds = dict.fromkeys(_labels(fold) for fold in inference_model(model).folds)
    assert list(folds) == CASES[lines]
    module = trained(model)
    folded = tokenmix.for_inference(module)
    same(module, folded, (9, 11), channels=6)


# Lines of a block -> the layers that compute an activation as well.
ACTIVATIONS = {
    "return x |> a: conv(4, 3) |> gelu": {"a": "gelu"},
    "return x |> a: dwconv(3, stride = 2) |> silu": {"a": "silu"},
    "return x |> a: dwconv(3, axis = width) |> gelu": {},
    "return x |> a: linear(4) |> relu": {"a": "relu"},
    "return x |> global_avg_pool |> a: pointwise(4) |> sigmoid": {"a": "sigmoid"},
    "return x |> a: conv(4, 3) |> n: batch_norm |> relu6 |> b: linear(5, bias = false) |> gelu": {
        "a": "relu6",
        "b": "gelu",
    },
    "y = x |> a: linear(4)\n    y = gelu(y)\n    return y + y": {"a": "gelu"},
    "y = x |> a: linear(4)\n    return y + gelu(y)": {},
    "return x |> a: linear(4) |> crop(H - 1, W) |> gelu": {},
    "module a = linear(6)\n    return x |> a |> gelu |> a": {},
    "for j in 0..2:\n        x = x |> a: linear(C) |> gelu\n    return x": {"a.0": "gelu", "a.1": "gelu"},
    "for j in 0..2:\n        x = x |> a: linear(C)\n        if j == 0:\n            x = gelu(x)\n    return x": {},
    "x = x |> a: linear(6)\n    if H > 3:\n        x = gelu(x)\n    return x": {},
    "x = x |> a: inner_layer |> gelu\n    return x": {"a.a": "gelu"},
    "x = x |> a: inner_layer |> gelu |> b: inner_layer\n    return x": {},
    "x = x |> a: inner_layer |> gelu |> b: inner_layer |> gelu\n    return x": {"a.a": "gelu", "b.a": "gelu"},
    "x = x |> a: inner_layer |> gelu |> b: inner_layer |> relu\n    return x": {},
}
INNER = "  block inner_layer(x):\n      return x |> n: batch_norm |> a: linear(C)\n"


@pytest.mark.parametrize("lines", ACTIVATIONS)
def test_activation_is_fused_exactly_where_it_can_be(lines, tmp_path):
    path = tmp_path / "probe.yaml"
    inner = INNER if "inner" in lines else ""
    path.write_text(SPEC + "".join(f"      {line}\n" for line in lines.replace("\n    ", "\n").split("\n")) + inner)
    model = tokenmix.load(path)
    assert model.findings == ()
    module = trained(model)
    folded = tokenmix.for_inference(module)
    fused = {
        path.removeprefix("stages.0.body."): part.activation
        for path, part in folded.named_modules()
        if isinstance(part, (FusedConv2d, FusedLinear, FusedPointwise))
    }
    assert fused == ACTIVATIONS[lines]
    assert not inner or not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())  # folded across the blocks
    same(module, folded, (9, 11), channels=6)
    single = tokenmix.for_inference(module.float())
    images = torch.randn(2, 6, 9, 11)
    expected = module(images).detach()
    assert (single(images) - expected).norm() <= 1e-5 * expected.norm()


# Lines of a block -> the layers that became one, and what the one is called.
JOINS = {
    "q = x |> q: linear(C)\n    k = x |> k: linear(C)\n    v = x |> v: linear(2 * C)\n"
    "    return attention(q, k, v; heads = 3)": [(("q", "k", "v"), "q_k_v")],
    "y = x |> n: batch_norm\n    q = y |> q: linear(C, bias = false)\n    k = y |> k: linear(C)\n"
    "    return attention(q, k, v: linear(y; C); heads = 2)": [(("q", "k", "v"), "q_k_v")],
    "q = x |> q: pointwise(C, bias = false)\n    return q * (x |> k: pointwise(C, bias = false))": [
        (("q", "k"), "q_k")
    ],
    "q = x |> q: linear(C, bias = false)\n    return q + (x |> k: linear(C))": [(("q", "k"), "q_k")],
    "for j in 0..2:\n        x = (x |> q: linear(C)) * (x |> k: linear(C))\n    return x": [
        (("q.0", "k.0"), "q_k.0"),
        (("q.1", "k.1"), "q_k.1"),
    ],
    "q_k = x |> q: linear(C)\n    k_part = x |> k: linear(C)\n    return q_k + k_part": [(("q", "k"), "q_k_")],
    "q = x |> q: linear(C)\n    if C > 3:\n        q = q + (x |> k: linear(C))\n    return q": [],
    "if C > 3:\n        y = (x |> q: linear(C)) + (x |> k: linear(C))\n    else:\n        y = x |> k: linear(C)\n"
    "    return y": [(("q", "k"), "q_k")],
    "y = x |> q: linear(C)\n    x = x + y\n    return x + (x |> k: linear(C))": [],
    "return (x |> q: linear(C)) + (x |> k: pointwise(C))": [],
    "return (x |> q: linear(C) |> layer_norm) + (x |> k: linear(C))": [],  # a norm would copy its part
    "return (x |> q: linear(C) |> gelu) + (x |> k: linear(C)) + (x |> v: linear(C))": [(("k", "v"), "k_v")],
    "module q = linear(C)\n    return (x |> q) + (x |> k: linear(C))": [],
    "y = x\n    for j in 0..2:\n        y = y + (x |> q: linear(C))\n    return y": [],
}


@pytest.mark.parametrize("lines", JOINS)
def test_layers_are_joined_exactly_where_they_can_be(lines, tmp_path):
    path = tmp_path / "probe.yaml"
    path.write_text(SPEC + "".join(f"      {line}\n" for line in lines.replace("\n    ", "\n").split("\n")))
    model = tokenmix.load(path)
    assert model.findings == ()
    place = "stages.0.body."
    joins = [
        (tuple(p.removeprefix(place) for p in j.layers), j.into.removeprefix(place))
        for j in inference_model(model).joins
    ]
    assert joins == JOINS[lines]
    module = trained(model)
    folded = tokenmix.for_inference(module)
    assert len(list(folded.parameters())) < len(list(module.parameters())) or not joins
    same(module, folded, (9, 11), channels=6)


def test_a_fixed_size_needs_no_padding_and_is_held_to(tmp_path):
    lines = "x = x |> pad_to(3)\nreturn x |> a: linear(C) |> pad_to(4) |> crop(9, W) |> resize(9, W)"
    path = tmp_path / "probe.yaml"
    path.write_text(SPEC + "".join(f"      {line}\n" for line in lines.split("\n")))
    module = trained(path)
    folded = tokenmix.for_inference(module, size="9x12")
    code = inspect.getsource(type(folded.stages[0].body))
    assert code.count("pad_to(") == 1 and "resize" not in code  # 9 rows are not a multiple of 4
    same(module, folded, (9, 12), channels=6)
    with pytest.raises(ValueError, match="made for images of 9x12"):
        folded(torch.zeros(1, 6, 12, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match="folded already"):
        tokenmix.for_inference(folded, size=9)
    with pytest.raises(tokenmix.FindingsError):
        tokenmix.for_inference(trained("mixformer_b0", **MODELS["mixformer_b0"]), size=60)


@pytest.mark.parametrize("name", ["mixformer_b0", "mat_1", "swin_t"])
def test_families_at_a_fixed_size(name):
    settings = {"depths": [1, 1, 1, 1]}
    module = trained(name, **settings)
    folded = tokenmix.for_inference(module, size=224)
    assert "pad_to(" not in inspect.getsource(sys.modules[type(folded).__module__])
    same(module, folded, (224, 224))


@pytest.mark.parametrize("name", ["convnext_t", "poolformer_s12", "emsnet_xxtiny"])
def test_a_norm_in_front_of_the_classifier_stays_where_there_may_be_none(name):
    settings = {"depths": [1, 1, 1, 1]}
    for classes in (0, 5):
        module = trained(name, num_classes=classes, **settings)
        same(module, tokenmix.for_inference(module), (64, 96))


def test_only_modules_of_a_spec_can_be_folded():
    with pytest.raises(TypeError, match=r"tokenmix\.build"):
        tokenmix.for_inference(nn.Linear(2, 2))


def test_weights_are_loaded_before_folding():
    from tokenmix.runtime.checkpoints import WeightsError

    folded = tokenmix.build("resnet18", for_inference=True)
    with pytest.raises(WeightsError, match="load the weights first"):
        tokenmix.load_weights(folded, tokenmix.build("resnet18").state_dict())


# More of the same blocks as a smaller variant of the family.
LARGER = {
    *("atmnet_b", "atmnet_l", "atmnet_s", "deit_b", "mat_5", "mixformer_b4", "mixformer_b5", "mixformer_b6"),
    *("partialformer_b3", "partialformer_b4", "resnet101", "swin_b", "swin_s"),
}


# Everything else shipped, and every way of every choice.
def _cases():
    assert set(shipped_specs()) > LARGER
    for name, path in sorted(shipped_specs().items()):
        spec = read_spec(path, [])
        if spec.is_family or name in LARGER:
            continue
        yield name, {}
        if path.parent.name != "ablations" or "depths" in spec.values:
            continue
        for parameter in spec.parameters.values():
            words = parameter.type.names if parameter.type is not None else ()
            if len(words) > 1:
                yield from ((name, {parameter.name: word}) for word in words)


@pytest.mark.parametrize(("name", "settings"), list(_cases()), ids=str)
def test_whatever_is_shipped_can_be_folded(name, settings):
    """Layer by layer of the folded source, every weight finds its place; values are compared above."""
    model = tokenmix.load(name, **settings)
    with torch.device("meta"):
        module = tokenmix.build(model)
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(1)
    folded = tokenmix.for_inference(module)
    assert sum(1 for _ in folded.state_dict()) <= sum(1 for _ in module.state_dict())


def test_a_folded_module_takes_no_other_tables_and_is_folded_once():
    folded = tokenmix.build("mixformer_b0", for_inference=True, depths=[1, 1, 1, 1])
    assert not any("bias_table" in key for key in folded.state_dict())
    assert tokenmix.for_inference(folded) is folded


def test_a_spec_that_changed_since_the_module_was_built_is_refused(tmp_path):
    path = tmp_path / "probe.yaml"
    text = SPEC + "      return x |> a: conv(C, 3, bias = false) |> n: batch_norm\n"
    path.write_text(text)
    module = tokenmix.build(path)
    path.write_text(text.replace("conv(C, 3", "conv(C, 5"))
    with pytest.raises(TypeError, match="changed since"):
        tokenmix.for_inference(module)
