"""The ops of partial attention against their definitions: talking heads, foreground and background."""

import pytest
import torch

import tokenmix
from tests.blocks.compared import draw, same
from tokenmix.blocks.kernels.attention import attention, attention_scores, weighted_sum
from tokenmix.blocks.kernels.talking_heads import TalkingHeadsAttention
from tokenmix.blocks.kernels.token_order import (
    background_attention,
    gather_tokens,
    replace_tokens,
    token_order,
    token_partition,
)
from tokenmix.dsl.diagnostics import FindingsError


@pytest.mark.parametrize(("n", "m", "heads", "inner", "d", "e"), [(5, 7, 3, 6, 4, 2), (1, 4, 2, 1, 3, 3)])
def test_talking_heads_are_linear_maps_around_the_softmax(n, m, heads, inner, d, e):
    torch.manual_seed(0)
    q, k, v = draw(2, n, heads * d), draw(2, m, heads * d), draw(2, m, heads * e)
    layer = TalkingHeadsAttention(heads, inner).double()
    logits = torch.einsum("gh,bhnm->bgnm", layer.logit_mixing, attention_scores(q, k, heads))
    weights = (logits + layer.logit_bias[:, None, None]).softmax(-1)
    weights = torch.einsum("hg,bgnm->bhnm", layer.weight_mixing, weights) + layer.weight_bias[:, None, None]
    same(layer(q, k, v), weighted_sum(weights, v), (q, k, v, *layer.parameters()))


def test_heads_that_do_not_talk_are_attention():
    torch.manual_seed(0)
    q, k, v = draw(2, 5, 6), draw(2, 7, 6), draw(2, 7, 9)
    layer = TalkingHeadsAttention(3, 3).double()
    with torch.no_grad():
        for weight, bias in ((layer.logit_mixing, layer.logit_bias), (layer.weight_mixing, layer.weight_bias)):
            weight.copy_(torch.eye(3))
            bias.zero_()
    same(layer(q, k, v), attention(q, k, v, 3), (q, k, v))


def test_fresh_maps_are_drawn_as_those_of_linear_layers():
    torch.manual_seed(0)
    layer = TalkingHeadsAttention(16, 64)
    for tensor, fan_in in zip(layer.parameters(), (16, 16, 64, 64), strict=True):
        assert 0.8 * fan_in**-0.5 < tensor.abs().max() <= fan_in**-0.5


@pytest.mark.parametrize("first", [0, 1, 7, 20])
def test_a_partition_is_the_best_tokens_and_the_others_by_position(first):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 4, (3, 20, 1), generator=generator).expand(-1, -1, 8).float()
    order, full = token_partition(x, first), token_order(x)
    assert order.dtype == torch.int64 and not order.requires_grad
    for ours, whole in zip(order.tolist(), full.tolist(), strict=True):
        assert ours == sorted(whole[:first]) + sorted(whole[first:])
    assert torch.equal(token_partition(x.unflatten(1, (4, 5)), first), order)


@pytest.mark.parametrize("first", [1, 4, 15])
def test_tokens_are_replaced_where_they_were_gathered(first):
    torch.manual_seed(0)
    x, tokens = draw(2, 3, 5, 4), draw(2, first, 4)
    order = token_partition(x, first)
    truth = x.flatten(1, 2).scatter(1, order[:, :first, None].expand(-1, -1, 4), tokens).unflatten(1, (3, 5))
    same(replace_tokens(x, order, tokens), truth, (x, tokens))
    same(replace_tokens(x.flatten(1, 2), order, tokens), truth.flatten(1, 2), (x, tokens))
    assert torch.equal(replace_tokens(x, order, gather_tokens(x, order[:, :first])), x)


@pytest.mark.parametrize("first", [0, 1, 9, 10])
def test_background_attention_is_attention_to_what_stands_behind(first):
    torch.manual_seed(0)
    q, k, v = draw(2, 3, 6), draw(2, 10, 6), draw(2, 10, 4)
    order = token_partition(k, first)
    truth = torch.stack(
        [
            attention(q[b : b + 1], k[b : b + 1, order[b, first:]], v[b : b + 1, order[b, first:]], 2)[0]
            for b in range(2)
        ]
    )
    ours = background_attention(q, k, v, order, first, 2)
    same(ours, truth, (q, k, v))
    assert first < 10 or not ours.any()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("y = talking_heads_attention(y, y, y; heads = 4, inner = 2)", "do not split evenly"),
        ("y = talking_heads_attention(y, y, y; heads = 3, inner = 0)", "at least one head"),
        ("y = talking_heads_attention(a, a, y; heads = 3, inner = 2)", "keys have 4 tokens and values 35"),
        ("y = talking_heads_attention(y |> linear(3), y, y; heads = 3, inner = 2)", "queries have 3 channels"),
        ("y = gather_tokens(x, x |> token_partition(36))", "there are not 36"),
        ("y = gather_tokens(x, order; first = 36)", "there are not 36"),
        ("y = gather_tokens(a, order; first = 3)", "the order is one of 35 tokens"),
        ("y = replace_tokens(a, order, y)", "the order is one of 35 tokens"),
        ("y = replace_tokens(y, order, a |> linear(3))", "cannot take the place"),
        ("y = replace_tokens(y, order, concat_tokens(y, a))", "there are no 39 places"),
        ("y = background_attention(y, a, a, order; first = 3, heads = 2)", "an order of 35 tokens, 4 keys"),
        ("y = background_attention(y, y, y, order; first = 36, heads = 2)", "there are not 36"),
        ("y = background_attention(y |> linear(4), y, y, order; first = 3, heads = 2)", "queries have 4 channels"),
        ("y = background_attention(y, y, y, order; first = 3, heads = 4)", "do not split evenly"),
        ("y = background_attention(y, y, y, order; first = 3, heads = 0)", "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, line, words):
    body = ["order = x |> token_order", "y = x |> to_tokens", "a, b = y |> split_tokens(4)", line, "return y"]
    path = tmp_path / "probe.yaml"
    path.write_text(
        "tokenmix: 1\nname: probe\ninput: [6, 5, 7]\nstages:\n  - body: probe_block()\ndefinitions: |\n"
        + "".join(f"  {text}\n" for text in ["block probe_block(x):", *(f"    {text}" for text in body)])
    )
    with pytest.raises(FindingsError, match=words):
        tokenmix.build(tokenmix.load(path))
