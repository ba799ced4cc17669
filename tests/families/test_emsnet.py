"""EMSNet: emitted modules against the naive reference in float64, its rules of sizes, and the counts of detectors."""

from pathlib import Path

import pytest
import torch

import tokenmix
from tests.families.keys import EMSNET as KEYS
from tests.families.keys import copy_weights, randomise
from tests.reference import emsnet
from tokenmix.blocks.kernels.folding import fold, unfold
from tokenmix.blocks.kernels.pooling import max_pool
from tokenmix.compiler.report import exact_misses

SPECS = Path(__file__).parents[2] / "specs"

CLOSE = 1e-9
# Small in width and depth; the last stage is wide enough for two heads of either attention.
SMALL = {"channels": (8, 16, 32, 256), "depths": (2, 1, 1, 1), "expand": (3, 2, 2, 1), "ratio": (1, 2, 1)}
OTHER = {**SMALL, "channels": (16, 8, 24, 32), "ratio": (2, 1, 1)}
# Square, not square, odd, and so small that the last map is one pixel.
SIZES = [(64, 64), (96, 64), (33, 47), (65, 97), (32, 32), (7, 5)]


def pair(arguments, **options):
    reference = emsnet.EMSNet(**arguments, num_classes=11).double()
    model = tokenmix.load("emsnet", **{k: list(v) for k, v in arguments.items()})
    module = tokenmix.build(model, num_classes=11, **options).double()
    randomise(reference)
    return reference, module, copy_weights(reference, module, KEYS)


def dense_of(reference, arguments):
    model = tokenmix.load("emsnet", **{k: list(v) for k, v in arguments.items()})
    module = tokenmix.build(model, features_only=True).double()
    keys = {k: v for k, v in reference.state_dict().items() if not k.startswith(("bn.", "classifier."))}
    bare = torch.nn.Module()
    bare.state_dict = lambda: keys
    copy_weights(bare, module, KEYS)
    return module


def close(a, b):
    return ((a - b).norm() / b.norm()).item() < CLOSE


def images(batch, size, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [*SIZES, (200, 333)])
@pytest.mark.parametrize("arguments", [SMALL, OTHER], ids=["small", "other"])
def test_scores_and_maps_equal_the_reference_at_every_size(size, arguments):
    reference, module, _ = pair(arguments)
    x = images(2 if size[0] < 200 else 1, size)
    with torch.no_grad():
        assert close(module.eval()(x), reference.eval()(x))
        ours, theirs = dense_of(reference, arguments).eval()(x), reference.forward_features(x)
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


def test_scores_of_the_smallest_variant_equal_the_reference():
    reference = emsnet.EMSNet(**emsnet.VARIANTS["XXTiny"]).double()
    module = tokenmix.build("emsnet_xxtiny").double()
    randomise(reference)
    copy_weights(reference, module, KEYS)
    x = images(1, (224, 224))
    with torch.no_grad():
        assert close(module.eval()(x), reference.eval()(x))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (33, 47), (65, 97)])
def test_gradients_of_weights_and_image_equal_the_reference(train, size):
    reference, module, keys = pair(SMALL)
    direction = torch.randn(2, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for model in (reference, module):
        x = images(2, size).requires_grad_()
        scores = model.train(train)(x)
        (scores * direction).sum().backward()
        gradients.append((scores.detach(), x.grad))
    assert all(close(ours, theirs) for theirs, ours in zip(*gradients, strict=True))
    ours = dict(module.named_parameters())
    largest = max(p.grad.norm().item() for p in reference.parameters())
    for name, parameter in reference.named_parameters():
        other = ours[keys[name]].grad.reshape(parameter.shape)
        # In training a shift that the next batch norm takes out again has no gradient but rounding.
        allowed = CLOSE * parameter.grad.norm().item() + 1e-13 * largest
        assert (other - parameter.grad).norm().item() < allowed, name
    buffers = dict(module.named_buffers())
    for name, buffer in reference.named_buffers():
        assert torch.allclose(buffers[keys[name]].to(buffer.dtype), buffer, rtol=CLOSE, atol=1e-12), name


def test_an_image_is_scored_alone_as_in_a_batch():
    _, module, _ = pair(SMALL)
    x = images(4, (33, 47))
    with torch.no_grad():
        together = module.eval()(x)
        assert all(close(module(x[i : i + 1]), together[i : i + 1]) for i in range(4))


@pytest.mark.parametrize("name", ["emsnet_xxtiny", "emsnet_xtiny", "emsnet_tiny"])
def test_without_classes_the_classifier_alone_is_missing(name):
    model, bare = tokenmix.load(name), tokenmix.load(name, classes=0)
    width = model.plan.parameters["channels"][-1]
    assert model.cost().params - bare.cost().params == 1000 * width + 1000
    # The dense backbone has no norm of the last map either.
    assert bare.cost().params - model.cost(dense=True).params == 2 * width


@pytest.mark.parametrize("path", sorted(SPECS.glob("**/emsnet_*.yaml")), ids=lambda path: path.stem)
def test_every_variant_and_ablation_has_its_exact_integers(path):
    model = tokenmix.load(path)
    assert model.findings == () and exact_misses(model) == []
    assert model.spec.published and {"params", "modules", "fvcore"} <= model.spec.exact[0].values.keys()


# Rules of single parts


def test_whitening_leaves_no_mean_over_the_channels():
    _, module, _ = pair(SMALL)
    whiten = module.stages[0].blocks[0].mixer.interaction.static.whiten
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    y = whiten(x)
    assert y.mean(-1).abs().max() < 1e-14
    assert close(y, whiten.proj(x) - whiten.proj(x).mean(-1, keepdim=True)) and y.mean((1, 2)).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(5, 8), (1, 2)])
def test_windows_of_ones_cover_even_rows_once_and_odd_rows_twice(size):
    cover = [[1 + (i % 2 and i + 1 < side) for i in range(side)] for side in size]
    ones = fold(torch.ones_like(unfold(torch.ones(1, *size, 1), 3, 2, 1)), *size, 3, 2, 1)[0, :, :, 0]
    assert torch.equal(ones, torch.outer(torch.tensor(cover[0]), torch.tensor(cover[1])).float())


def test_even_weights_spread_the_mean_of_each_window_over_it():
    attention = pair(SMALL)[1].stages[0].blocks[0].mixer.interaction.dynamic.local.attn.eval()
    with torch.no_grad():
        attention.weights.weight.zero_()
        attention.weights.bias.fill_(3.0)
        attention.value.weight.copy_(torch.eye(2))
        x = torch.arange(9.0, dtype=torch.float64).view(1, 3, 3, 1).expand(-1, -1, -1, 2)
        y = attention(x)[0, :, :, 0]
    # Windows around the four corners hold 0 1 3 4, 1 2 4 5, 3 4 6 7 and 4 5 7 8, and five zeros from outside.
    corners = torch.tensor([[8, 12], [20, 24]], dtype=torch.float64) / 9
    sides = corners.sum(0), corners.sum(1)
    truth = [
        [corners[0, 0], sides[1][0], corners[0, 1]],
        [sides[0][0], corners.sum(), sides[0][1]],
        [corners[1, 0], sides[1][1], corners[1, 1]],
    ]
    assert torch.allclose(y, torch.tensor(truth, dtype=torch.float64), rtol=1e-12)


# Side of the map in each stage at 224, and per branch the grid and what it spreads to before it is fitted to the map.
GRIDS = [
    (56, {"fine_scale": (28, 56), "coarse_scale": (14, 56), "local": (14, 56), "whole": (10, 60)}),
    (28, {"fine_scale": (14, 28), "coarse_scale": (7, 28), "local": (7, 28), "whole": (5, 30)}),
    (14, {"fine_scale": (7, 14), "coarse_scale": (4, 16), "local": (4, 16), "whole": (3, 18)}),
    (7, {"fine_scale": (4, 8), "coarse_scale": (2, 8), "local": (2, 8), "whole": (2, 12)}),
]


def test_grids_and_what_is_cropped_or_resized_are_those_of_the_worked_table():
    found = {}
    for _, path, node, _ in tokenmix.load("emsnet_xxtiny").elaborate().walk():
        parts = path.split(".")
        if "blocks.0" not in path or parts[0] != "stages":
            continue
        stage, branch = int(parts[1]), next((p for p in parts if p in GRIDS[0][1]), None)
        if node.target.name == "dwconv_transpose":
            found[stage, branch] = [node.outputs[0].H]
        elif branch and node.target.name in ("crop", "resize"):
            found[stage, branch] += [node.target.name, node.outputs[0].H, node.tally.get("resize_bilinear", 0) > 0]
        elif node.target.name in ("max_pool", "adaptive_avg_pool"):
            grid = node.outputs[0].H
            assert grid == GRIDS[stage][1][branch][0]
    for stage, (side, branches) in enumerate(GRIDS):
        for branch, (_, spread) in branches.items():
            fit = "crop" if branch.endswith("scale") else "resize"
            assert found[stage, branch] == [spread, fit, side, fit == "resize" and spread != side]


def test_a_token_of_the_static_operator_goes_back_to_the_pixels_it_was_pooled_from():
    scale = pair(SMALL)[1].stages[2].blocks[0].mixer.interaction.static.coarse_scale.eval()
    with torch.no_grad():
        x = torch.zeros(1, 7, 6, 4, dtype=torch.float64)
        before = scale(x)
        for row, column in ((6, 5), (3, 3), (4, 1)):
            scale.coordinate = torch.nn.Identity()  # tokens stay apart
            plain = scale(x)
            x[0, row, column] = 5.0
            changed = (scale(x) != plain).any(-1)[0]
            x[0, row, column] = 0.0
            expected = torch.zeros(7, 6, dtype=torch.bool)
            expected[row // 4 * 4 : row // 4 * 4 + 4, column // 4 * 4 : column // 4 * 4 + 4] = True
            assert torch.equal(changed, expected)
    assert before.shape == (1, 7, 6, 4)


def detector(channels, height, width):
    """Parameters and arithmetic (with biases and ReLUs) of RetinaNet's pyramid and heads: 80 classes, 9 anchors."""

    def conv(inputs, outputs, kernel, level, relu=False):
        positions = levels[level][0] * levels[level][1]
        weights = inputs * outputs * kernel**2
        return weights + outputs, positions * (weights + outputs + (outputs if relu else 0))

    levels = [(-(-height // 2**k), -(-width // 2**k)) for k in range(3, 8)]
    pyramid = [conv(c, 256, 1, i) for i, c in enumerate(channels[1:])] + [conv(256, 256, 3, i) for i in range(3)]
    pyramid += [conv(channels[3], 256, 3, 3), conv(256, 256, 3, 4)]
    heads = [
        [conv(256, 256, 3, i, relu=True)] * 8 + [conv(256, 9 * 80, 3, i), conv(256, 9 * 4, 3, i)] for i in range(5)
    ]
    params = sum(p for p, _ in pyramid + heads[0])
    return params, sum(m for head in [pyramid, *heads] for _, m in head)


@pytest.mark.parametrize(
    ("name", "params", "total"),
    [
        ("emsnet_xxtiny", 11_740_478, 162_048_901_952),
        ("emsnet_xtiny", 11_403_366, 165_321_078_096),
        ("emsnet_tiny", 14_762_216, 190_200_025_176),
    ],
)
def test_detectors_have_the_size_worked_out_for_them(name, params, total):
    """RetinaNet at 1280 x 800 (table 3.3), the norm in front of the classifier counted with the backbone."""
    model = tokenmix.load(name)
    channels = model.plan.parameters["channels"]
    backbone = model.cost((800, 1280), dense=True)
    head_params, head_macs = detector(channels, 800, 1280)
    assert backbone.params + 2 * channels[-1] + head_params == params
    assert backbone["modules"] + backbone["bias_conv"] + head_macs == total


class Pooling(torch.nn.Module):
    def forward(self, x):
        return max_pool(x, 4, 4, 0, ceil_mode=True)


def test_a_traced_pooling_in_ceil_mode_serves_every_size():
    """Whether the last window begins inside of the map is not asked of unknown sizes."""
    x = -10 - torch.rand(2, 9, 14, 3)
    sides = {axis: torch.export.Dim(name, min=5) for axis, name in ((1, "height"), (2, "width"))}
    program = torch.export.export(Pooling(), (x,), dynamic_shapes=(sides,)).module()
    compiled = torch.compile(Pooling(), fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((9, 14), (8, 16), (7, 13), (20, 5)):
        x = (-10 - torch.rand(2, *size, 3)).requires_grad_()
        assert torch.equal(program(x), Pooling()(x)) and torch.equal(compiled(x), Pooling()(x))
        ours, plain = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, Pooling()))
        assert torch.equal(ours, plain)
