"""Attention between tokens: in one step, or in its parts for mixers that work on the scores."""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HeadMixing", "attention", "attention_scores", "weighted_sum", "windowed_attention"]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention, scale d**-0.5, of (B, ..., C) queries to the tokens of k and v; shape of q, channels of v."""

    def split(x: Tensor) -> Tensor:  # (B, ..., C) -> (B, h, N, d)
        return x.flatten(1, -2).unflatten(-1, (heads, -1)).transpose(1, 2)

    x = F.scaled_dot_product_attention(split(q), split(k), split(v))
    return x.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`attention` inside of every window, (B, n, N, C)."""

    def split(x: Tensor) -> Tensor:  # (B, n, N, C) -> (B * n, h, N, d)
        return x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)

    x = F.scaled_dot_product_attention(split(q), split(k), split(v))
    return x.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


def attention_scores(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """q k^T * d**-0.5 per head, (..., N, C) and (..., M, C) to (..., h, N, M)."""
    q = q.unflatten(-1, (heads, -1)).transpose(-3, -2)
    k = k.unflatten(-1, (heads, -1)).transpose(-3, -2)
    return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


def weighted_sum(scores: Tensor, v: Tensor) -> Tensor:
    """Values summed with weights, (..., h, N, M) and (..., M, C) to (..., N, C), heads side by side."""
    v = v.unflatten(-1, (scores.shape[-3], -1)).transpose(-3, -2)
    return (scores @ v).transpose(-3, -2).flatten(-2)


class HeadMixing(nn.Conv2d):
    """A 1x1 convolution across the heads of attention scores, (..., h, N, M) to (..., out, N, M)."""

    def __init__(self, heads: int, out: int, bias: bool = True):
        super().__init__(heads, out, 1, bias=bias)

    def forward(self, scores: Tensor) -> Tensor:
        mixed = super().forward(scores.flatten(0, -4))
        return mixed.unflatten(0, scores.shape[:-3]) if scores.ndim > 4 else mixed
