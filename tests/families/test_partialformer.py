"""PartialFormer: emitted modules against the naive reference in float64, and the counts of the worked example."""

from fractions import Fraction

import pytest
import torch

import tokenmix
from tests.families.keys import PARTIALFORMER as KEYS
from tests.families.keys import copy_weights, randomise
from tests.reference import partialformer
from tokenmix.compiler.report import exact_misses
from tokenmix.runtime.module import import_source

CLOSE = 1e-9
# Small in width and depth, and different from the variants in what they share.
SMALL = {"dim": 8, "depths": (2, 1, 2, 1), "heads": (2, 2, 4, 4)}
OTHER = {
    "head_expand": 3,
    "reduction": 3,
    "min_hidden": 5,
    "shares": (Fraction(1, 7), Fraction(3, 8), Fraction(1, 2), Fraction(1, 1)),
    "cpe": 7,
    "hidden_conv": False,
}
# Square, not square, odd; 224 is a table's size. At 32x32 the last stage is one token, at 16x16 and 7x5 more are.
SIZES = [(64, 64), (96, 64), (100, 167), (33, 47), (32, 32), (16, 16), (7, 5)]


def values(reference):
    """The reference's arguments as hyperparameters of the spec."""
    renamed = {"dim": "C", "cpe": "position_kernel"}
    found = {renamed.get(k, k): list(v) if isinstance(v, tuple) else v for k, v in reference.items()}
    shares = found.pop("shares", None)
    if shares:
        found |= {"share_over": [s.numerator for s in shares], "share_under": [s.denominator for s in shares]}
    return found


def pair(arguments, **options):
    dense = options.get("features_only", False)
    model = tokenmix.load("partialformer", **values(arguments))
    reference = partialformer.PartialFormer(**arguments, num_classes=11, dense=dense).double()
    module = tokenmix.build(model, **({} if dense else {"num_classes": 11}), **options).double()
    randomise(reference)
    # Weights of a fan-in of a few heads leave the softmax flat; the query token is one row of many.
    with torch.no_grad():
        for name, tensor in reference.named_parameters():
            if "query_token" in name:
                tensor.mul_(tensor.shape[-1] ** 0.5)
    return reference, module, copy_weights(reference, module, KEYS)


def close(a, b):
    return ((a - b).norm() / b.norm()).item() < CLOSE


def images(batch, size, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("other", [{}, OTHER], ids=["plain", "other"])
def test_scores_and_maps_equal_the_reference_at_every_size(size, other):
    x = images(2, size)
    reference, module, _ = pair(SMALL | other)
    with torch.no_grad():
        assert close(module.eval()(x), reference.eval()(x))
    reference, module, _ = pair(SMALL | other, features_only=True)
    with torch.no_grad():
        ours, theirs = module.eval()(x), reference.eval()(x)
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


def test_b0_equals_the_reference_at_224():
    x = images(1, (224, 224))
    reference, module, _ = pair(partialformer.VARIANTS["B0"])
    with torch.no_grad():
        assert close(module.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(
    ("size", "train"), [((96, 64), False), ((96, 64), True), ((33, 47), True), ((100, 167), False), ((32, 32), False)]
)
@pytest.mark.parametrize("other", [{}, OTHER], ids=["plain", "other"])
def test_gradients_of_weights_and_image_equal_the_reference(size, train, other):
    reference, module, keys = pair(SMALL | other)
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
        if parameter.grad is None:  # no background: nothing asks it
            assert "channel_" in name and not found.any(), name
            continue
        # A bias in front of a norm over its own axis has no gradient but rounding.
        scale = max(parameter.grad.norm().item(), 1e-2)
        assert (found - parameter.grad).norm().item() < CLOSE * scale, name
    for name, buffer in reference.named_buffers():
        assert torch.allclose(dict(module.named_buffers())[keys[name]].to(buffer.dtype), buffer, rtol=1e-9, atol=1e-12)


def test_every_parameter_gets_a_gradient():
    _, module, _ = pair(SMALL)
    module.eval()(images(2, (96, 64))).square().sum().backward()
    for name, parameter in module.named_parameters():
        # A softmax over keys does not see what is the same for every key.
        blind = name.endswith("logit_bias")
        assert parameter.grad.abs().max().item() > 1e-9 or blind, name


def test_an_image_is_scored_alone_as_in_a_batch():
    _, module, _ = pair(SMALL)
    x = images(8, (33, 47))
    with torch.no_grad():
        together = module.eval()(x)
        assert all(close(module(x[i : i + 1]), together[i : i + 1]) for i in range(8))
        others = torch.cat([x[:1], 10 * images(7, (33, 47), seed=1)])
        assert close(module(others)[:1], together[:1])


def attention(shares):
    """The attention of the first stage alone, ours and the reference's, with equal weights."""
    reference, module, _ = pair(SMALL | {"shares": (shares,) * 4})
    return reference.stages[0][0].attn, module.stages[0].blocks[0].attn


@pytest.mark.parametrize("share", [Fraction(1, 64), Fraction(1, 5), Fraction(1, 2), Fraction(1, 1)])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 5), (9, 7)])
def test_equal_scores_are_taken_in_the_order_of_positions(share, size):
    theirs, ours = attention(share)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, *size, 8, generator=generator, dtype=torch.float64)
    # Means of eight small integers are exact, and most of them equal.
    t = torch.randint(0, 2, (3, *size, 1), generator=generator).expand_as(x).double()
    with torch.no_grad():
        found, truth = ours(x, t), theirs(x.flatten(1, 2), t.flatten(1, 2)).unflatten(1, size)
        assert close(found, truth) and torch.equal(found, ours(x, t))


def test_only_the_set_of_foreground_tokens_matters():
    _, ours = attention(Fraction(1, 2))
    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    high = (torch.arange(24) % 2).double().view(1, 4, 6, 1)
    within = torch.rand(1, 4, 6, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / 2
    with torch.no_grad():
        assert close(ours(x, high.expand_as(x)), ours(x, (high + within).expand_as(x)))


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        ((224, 224), (49, 49, 39, 20)),
        ((256, 192), (48, 48, 38, 19)),
        ((320, 320), (100, 100, 80, 40)),
        ((250, 333), (83, 84, 67, 35)),
        ((384, 384), (144, 144, 115, 58)),
        ((512, 512), (256, 256, 205, 102)),
        ((512, 2048), (1024, 1024, 819, 410)),
        ((800, 1280), (1000, 1000, 800, 400)),
        ((32, 32), (1, 1, 1, 1)),
    ],
)
def test_the_foreground_is_the_share_rounded_half_up(size, counts):
    graph = tokenmix.load("partialformer_b0").elaborate(size, dense=True)
    found = {}
    for _, path, node, _ in graph.walk():
        if path.endswith("blocks.0.attn.attend"):
            found[path] = node.outputs[0].N - 1
    assert tuple(found.values()) == counts


@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3", "b4", "b1_cpe7"])
def test_every_exact_integer_is_met(variant):
    model = tokenmix.load(f"partialformer_{variant}")
    assert model.spec.exact and exact_misses(model) == []


@pytest.mark.parametrize("variant", partialformer.VARIANTS)
def test_the_reference_has_as_many_parameters(variant):
    with torch.device("meta"):
        reference = partialformer.PartialFormer(**partialformer.VARIANTS[variant])
    params = tokenmix.load(f"partialformer_{variant.lower()}").cost().params
    assert sum(p.numel() for p in reference.parameters()) == params


def test_partial_attention_alone_costs_what_the_text_says(tmp_path):
    """Section 5.3.3: 3136 tokens of 64 channels with 8 heads cost 40.1 million multiply-adds, 49 in the foreground."""
    path = tmp_path / "example.yaml"
    path.write_text(
        "tokenmix: 1\nname: example\ninput: [64, 56, 56]\nstages:\n  - body: example_block()\ndefinitions: |\n"
        "  block example_block(x):\n"
        "      return partial_attention(x, x; heads = 8, share_over = 1, share_under = 64)\n"
    )
    cost = tokenmix.load(path).cost()
    N, d, heads, foreground, hidden = 3136, 64, 8, 50, 8
    assert (
        cost["mac"]
        == 40_108_416
        == sum(
            (
                3 * d**2 * (N + 1),
                2 * d * foreground**2,
                2 * 2 * heads**2 * foreground**2,
                d**2 * foreground,
                2 * d * (N - 49) + 2 * d * hidden,
            )
        )
    )
    assert cost["fvcore"] == 40_108_456


def test_a_half_precision_model_runs_and_is_finite():
    _, module, _ = pair(SMALL)
    x = images(2, (64, 64)).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert module.float().eval()(x).isfinite().all()
    module.bfloat16()(x.bfloat16()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_the_standalone_source_is_clean_and_computes_the_same():
    model = tokenmix.load("partialformer_b0", **values(SMALL))
    source = model.source(standalone=True)
    assert "import tokenmix" not in source and "from tokenmix" not in source
    assert max(map(len, source.splitlines())) <= 120
    alone = import_source(source, "standalone").PartialformerB0().eval()
    usual = tokenmix.build(model, kernels="reference").eval()
    alone.load_state_dict(usual.state_dict())
    x = images(2, (33, 47)).float()
    with torch.no_grad():
        assert torch.equal(alone(x), usual(x))
