"""Attention whose heads talk to each other before and after the softmax."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TalkingHeadsAttention", "talking_heads_attention"]


def talking_heads_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_mixing: Tensor,
    logit_bias: Tensor,
    weight_mixing: Tensor,
    weight_bias: Tensor,
) -> Tensor:
    """Softmax attention, scale d**-0.5, with linear maps across heads around the softmax.

    Args:
        q: (B, N, C) queries.
        k, v: (B, M, C) keys and (B, M, C') values; heads share the channels.
        logit_mixing, logit_bias: (g, h) and (g,), from the scores of h heads to the logits of g inner heads.
        weight_mixing, weight_bias: (h, g) and (h,), from the weights of the inner heads back to h heads.

    Shape: the result is (B, N, C').
    """
    heads = len(weight_mixing)

    def split(x: Tensor) -> Tensor:  # (B, N, C) -> (B, h, N, d)
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = split(q), split(k), split(v)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    weights = F.conv2d(scores, logit_mixing[:, :, None, None], logit_bias).softmax(-1)
    weights = F.conv2d(weights.to(q.dtype), weight_mixing[:, :, None, None], weight_bias)
    return (weights @ v).transpose(1, 2).flatten(2)


class TalkingHeadsAttention(nn.Module):
    """Softmax attention with linear maps across heads before and after the softmax.

    Args:
        heads: number of heads h; they split the channels evenly.
        inner: number of heads g between the two maps, where the softmax is.

    Shape: q (B, N, C), k (B, M, C) and v (B, M, C') to (B, N, C').

    Source: Talking-Heads Attention (Shazeer et al. 2020), section 3, there without biases.
    """

    def __init__(self, heads: int, inner: int):
        super().__init__()
        self.logit_mixing = nn.Parameter(torch.empty(inner, heads))
        self.logit_bias = nn.Parameter(torch.empty(inner))
        self.weight_mixing = nn.Parameter(torch.empty(heads, inner))
        self.weight_bias = nn.Parameter(torch.empty(heads))
        # As torch draws those of its linear and 1x1 convolution layers.
        for weight, bias in ((self.logit_mixing, self.logit_bias), (self.weight_mixing, self.weight_bias)):
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return talking_heads_attention(
            q, k, v, self.logit_mixing, self.logit_bias, self.weight_mixing, self.weight_bias
        )

    def extra_repr(self) -> str:
        return f"heads={self.weight_mixing.shape[0]}, inner={self.weight_mixing.shape[1]}"
