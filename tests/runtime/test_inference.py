"""Modules folded for inference equal the ones they were made from, and hold fewer layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tokenmix
from tests.families.keys import randomise
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
    assert sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules()) == 4  # 23 in training
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
    "if C > 3:\n        x = x |> n: batch_norm |> a: pointwise(C)\n"
    "    else:\n        x = x |> a: pointwise(C) |> n: batch_norm\n    return x": [
        Fold("n", "a", False),
        Fold("n", "a", True),
    ],
    "if C > 9:\n        x = x |> n: batch_norm |> a: pointwise(C)\n"
    "    else:\n        x = x |> a: pointwise(C) |> gelu |> n: batch_norm\n    return x": [Fold("n", "a", False)],
    "module a = linear(6)\n    return x |> a |> n: batch_norm |> a": [],
    "for j in 0..2:\n        x = x |> a: conv(C, 3, bias = false) |> n: batch_norm\n    return x": [
        Fold("n", "a", True)
    ],
    "for i in 0..2:\n        for j in 0..2:\n            x = x |> a: conv(C, 3) |> n: batch_norm\n    return x": [
        Fold("n", "a", True)
    ],
}


@pytest.mark.parametrize("lines", CASES)
def test_norm_is_folded_exactly_where_it_can_be(lines, tmp_path):
    path = tmp_path / "probe.yaml"
    path.write_text(SPEC + "".join(f"      {line}\n" for line in lines.replace("\n    ", "\n").split("\n")))
    model = tokenmix.load(path)
    assert model.findings == ()
    _, folds = inference_model(model)
    assert list(folds["probe_block"]) == CASES[lines]
    module = trained(model)
    folded = tokenmix.for_inference(module)
    same(module, folded, (9, 11), channels=6)


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
