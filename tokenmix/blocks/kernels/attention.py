"""Attention between all tokens."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention, scale d**-0.5, of (B, ..., C) queries to the tokens of k and v; shape of q, channels of v."""

    def split(x: Tensor) -> Tensor:  # (B, ..., C) -> (B, h, N, d)
        return x.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2)

    x = F.scaled_dot_product_attention(split(q), split(k), split(v))
    return x.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])
