"""Tokens in the order of a score, and back in their places."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "background_attention",
    "gather_tokens",
    "partition",
    "replace_tokens",
    "scatter_tokens",
    "token_order",
    "token_partition",
    "token_scores",
]


def token_scores(x: Tensor) -> Tensor:
    """Means over the channels of (B, N, C) or (B, H, W, C) in float32 at least, (B, N), without gradient."""
    return x.detach().mean(-1, dtype=torch.promote_types(x.dtype, torch.float32)).flatten(1)


def token_order(x: Tensor) -> Tensor:
    """Positions of the tokens of (B, N, C) or (B, H, W, C), largest mean over channels first, as (B, N) integers.

    Equal means keep the order of positions; one that is not a number comes first. An order has no gradient.
    """
    return token_scores(x).argsort(dim=1, descending=True, stable=True)


def token_partition(x: Tensor, first: int) -> Tensor:
    """Positions as of `token_order`, but the `first` ones and the others each in the order of positions."""
    return partition(token_scores(x), first)


def partition(scores: Tensor, first: int) -> Tensor:
    """Positions of the `first` largest of (B, N) scores, then of the others, each part in the order of positions."""
    front, back = scores.argsort(dim=1, descending=True, stable=True).tensor_split((first,), dim=1)
    return torch.cat((front.sort(1).values, back.sort(1).values), dim=1)


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Token `order[i]` of every image at place i, (B, n, C) for an order (B, n); a map is read row by row."""
    tokens = x.flatten(1, -2)
    return tokens.flatten(0, 1).index_select(0, _rows(order, tokens.shape[1])).unflatten(0, order.shape)


def scatter_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Token i of every image at place `order[i]`: undoes `gather_tokens`."""
    tokens = x.flatten(0, 1)
    return torch.empty_like(tokens).index_copy(0, _rows(order, order.shape[1]), tokens).unflatten(0, order.shape)


def replace_tokens(x: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
    """`x`, (B, N, C) or (B, H, W, C), with token i of `tokens` (B, n, C) at place `order[i]` of every image."""
    rows = _rows(order[:, : tokens.shape[1]], order.shape[1])
    return x.flatten(0, -2).index_copy(0, rows, tokens.flatten(0, 1).to(x.dtype)).view(x.shape)


def background_attention(q: Tensor, k: Tensor, v: Tensor, order: Tensor, first: int, heads: int) -> Tensor:
    """Softmax attention, scale d**-0.5, of (B, n, C) queries to the tokens behind the `first` of the order."""

    def split(x: Tensor) -> Tensor:  # (B, N, C) -> (B, h, N, d)
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    k, v = (split(gather_tokens(x, order[:, first:])) for x in (k, v))
    return F.scaled_dot_product_attention(split(q), k, v).transpose(1, 2).flatten(2)


def _rows(order: Tensor, count: int) -> Tensor:
    """Places in the tokens of all images laid end to end: whole rows are copied faster than element by element."""
    return (order + count * torch.arange(len(order), device=order.device).unsqueeze(1)).flatten()
