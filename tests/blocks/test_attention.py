"""Attention in one step and in its parts against loops over heads, queries and keys."""

import math

import pytest
import torch

from tests.blocks.compared import draw, same
from tokenmix.blocks.kernels.attention import (
    HeadMixing,
    attention,
    attention_scores,
    weighted_sum,
    windowed_attention,
)
from tokenmix.blocks.kernels.tokens import concat_tokens

B, HEADS, D = 2, 3, 4
C = HEADS * D


def scores_naively(q, k):
    """(N, C) and (M, C) to (h, N, M)."""
    rows = [
        [
            [sum(q[i, h * D + c] * k[j, h * D + c] for c in range(D)) / math.sqrt(D) for j in range(len(k))]
            for i in range(len(q))
        ]
        for h in range(HEADS)
    ]
    return torch.stack([torch.stack([torch.stack(r) for r in head]) for head in rows])


def sum_naively(s, v):
    """(h, N, M) and (M, C) to (N, C)."""
    return torch.cat([s[h] @ v[:, h * D : (h + 1) * D] for h in range(HEADS)], dim=-1)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (1, 3), (4, 1)])
def test_scores_softmax_and_sum_are_attention(n, m):
    torch.manual_seed(0)
    q, k, v = draw(B, n, C), draw(B, m, C), draw(B, m, C)
    scores = attention_scores(q, k, HEADS)
    same(scores, torch.stack([scores_naively(a, b) for a, b in zip(q, k, strict=True)]), (q, k))
    out = weighted_sum(scores.softmax(-1), v)
    truth = torch.stack([sum_naively(scores_naively(a, b).softmax(-1), c) for a, b, c in zip(q, k, v, strict=True)])
    same(out, truth, (q, k, v))
    same(attention(q, k, v, HEADS), truth, (q, k, v))


def test_windows_attend_each_to_itself():
    torch.manual_seed(0)
    q, k, v = draw(B, 3, 5, C), draw(B, 3, 4, C), draw(B, 3, 4, C)
    truth = torch.stack(
        [
            torch.stack([sum_naively(scores_naively(q[b, n], k[b, n]).softmax(-1), v[b, n]) for n in range(3)])
            for b in range(B)
        ]
    )
    same(windowed_attention(q, k, v, HEADS), truth, (q, k, v))
    same(weighted_sum(attention_scores(q, k, HEADS).softmax(-1), v), truth, (q, k, v))


@pytest.mark.parametrize("lead", [(B,), (B, 3)])
def test_heads_are_mixed_at_every_pair(lead):
    torch.manual_seed(0)
    s = draw(*lead, HEADS, 4, 5)
    mixing = HeadMixing(HEADS, 2).double()
    weight = mixing.weight.flatten(1)
    truth = torch.stack(
        [sum(weight[o, h] * s[..., h, :, :] for h in range(HEADS)) + mixing.bias[o] for o in range(2)], dim=-3
    )
    same(mixing(s), truth, (s, mixing.weight, mixing.bias))


def test_a_parameter_and_a_vector_are_tokens_of_every_image_and_window():
    parameter, vector = draw(C), draw(B, C)
    tokens, windows = draw(B, 4, C), draw(B, 3, 4, C)
    joined = concat_tokens(parameter, tokens, vector)
    assert joined.shape == (B, 6, C)
    for b in range(B):
        assert joined[b, 0].equal(parameter) and joined[b, 1:5].equal(tokens[b]) and joined[b, 5].equal(vector[b])
    joined = concat_tokens(windows, parameter, vector)
    assert joined.shape == (B, 3, 6, C)
    assert (
        joined[1, 2, 4].equal(parameter) and joined[1, 2, 5].equal(vector[1]) and joined[1, 2, :4].equal(windows[1, 2])
    )
    assert concat_tokens(vector, parameter).shape == (B, 2, C)
