"""Joining tokens."""

import torch
from torch import Tensor

__all__ = ["concat_tokens"]


def concat_tokens(*parts: Tensor) -> Tensor:
    """Join (B, N, C) tokens or (B, n, N, C) windows along N.

    A (C,) parameter or a (B, C) vector is one token more, the same in every image or window.
    """
    most = max(part.ndim for part in parts)
    widest = next(part for part in parts if part.ndim == most)
    lead = widest.shape[:-2] if widest.ndim > 2 else widest.shape[:1]

    def tokens(x: Tensor) -> Tensor:
        if x.ndim > 2:
            return x
        x = x.reshape(*x.shape[:-1], *[1] * (len(lead) + 2 - x.ndim), x.shape[-1])
        return x.expand(*lead, 1, x.shape[-1])

    return torch.cat([tokens(part) for part in parts], dim=-2)
