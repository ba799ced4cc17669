"""Tokens in the order of a score, and back in their places."""

import torch
from torch import Tensor

__all__ = ["gather_tokens", "scatter_tokens", "token_order"]


def token_order(x: Tensor) -> Tensor:
    """Positions of the tokens of (B, N, C) or (B, H, W, C), largest mean over channels first, as (B, N) integers.

    The mean is taken in float32 at least. Equal means keep the order of positions; one that is not a number comes
    first. An order has no gradient.
    """
    score = x.detach().mean(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return score.flatten(1).argsort(dim=1, descending=True, stable=True)


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Token `order[i]` of every image at place i, (B, N, C); a map is read row by row."""
    # Whole rows of all images' tokens laid end to end: they are copied faster than element by element.
    B, N = order.shape
    rows = order + N * torch.arange(B, device=order.device).unsqueeze(1)
    return x.flatten(0, -2).index_select(0, rows.flatten()).unflatten(0, (B, N))


def scatter_tokens(x: Tensor, order: Tensor) -> Tensor:
    """Token i of every image at place `order[i]`: undoes `gather_tokens`."""
    B, N = order.shape
    rows = order + N * torch.arange(B, device=order.device).unsqueeze(1)
    tokens = x.flatten(0, 1)
    return torch.empty_like(tokens).index_copy(0, rows.flatten(), tokens).unflatten(0, (B, N))
