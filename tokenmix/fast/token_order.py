"""Foreground and background of partial attention without sorting and without copies of the background.

`token_partition` is the op `torch.ops.tokenmix.token_partition`, on scores: a selection in C++ on the CPU where it was
built, elsewhere the sort of the reference. `background_attention` runs everywhere as torch's fused attention to all
tokens, those of the foreground masked out.
Source: Efficient Vision Transformers with Partial Attention (Vo et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenmix.blocks.kernels import token_order as kernels
from tokenmix.fast.arguments import DTYPES, integers, pointers
from tokenmix.fast.cases import Case
from tokenmix.fast.native import library, missing

__all__ = ["background_attention", "cases", "status", "token_partition"]

_NATIVE = library()


def status() -> dict[str, tuple[str, str]]:
    """Device -> (which implementation runs there, why not a faster one)."""
    return {
        "cpu": ("C++ selection", "") if _NATIVE else ("sort", missing()),
        "cuda": ("sort", "nothing faster is written"),
    }


def cases(batch: int) -> Iterator[Case]:
    """PartialFormer-B1's maps at 224x224; keys and values are thirds of a wider tensor."""
    for side, channels, heads, first in ((56, 32, 2, 49), (28, 64, 4, 49), (14, 128, 8, 39), (7, 256, 16, 20)):
        x = torch.randn(batch, side, side, channels)
        yield Case(
            f"token_partition {batch}x{side}x{side}x{channels}",
            (x,),
            partial(token_partition, first=first),
            partial(kernels.token_partition, first=first),
        )
        q, (_, k, v) = torch.randn(batch, 1, channels), torch.randn(batch, side**2, 3 * channels).chunk(3, -1)
        order = kernels.token_partition(x, first)
        yield Case(
            f"background_attention {batch}x{side**2}x{channels}",
            (q, k, v, order),
            partial(background_attention, first=first, heads=heads),
            partial(kernels.background_attention, first=first, heads=heads),
        )


@torch.library.custom_op("tokenmix::token_partition", mutates_args=())
def _partition(scores: Tensor, first: int) -> Tensor:
    """The reference, on devices without a kernel of their own."""
    return kernels.partition(scores, first)


@_partition.register_fake
def _(scores: Tensor, first: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.int64)


def _native_partition(scores: Tensor, first: int) -> Tensor:
    assert _NATIVE is not None
    if scores.dtype not in DTYPES:
        return kernels.partition(scores, first)
    scores = scores.contiguous()
    order = torch.empty(scores.shape, dtype=torch.int64)
    if order.numel():
        run = getattr(_NATIVE, f"token_partition_{DTYPES[scores.dtype]}")
        run(*pointers(scores, order), *integers(*scores.shape, first), torch.get_num_threads())
    return order


def _selected(x: Tensor, first: int) -> Tensor:
    """`token_partition` of the reference, by selection."""
    return _partition(kernels.token_scores(x), first)


def background_attention(q: Tensor, k: Tensor, v: Tensor, order: Tensor, first: int, heads: int) -> Tensor:
    """Softmax attention, scale d**-0.5, of (B, n, C) queries to the tokens behind the `first` of the order.

    Keys and values, (B, N, C) or (B, H, W, C), are read where they lie: weights of the foreground become zero.
    """
    k, v = k.flatten(1, -2), v.flatten(1, -2)
    if first == k.shape[1]:  # attention to no tokens
        return q.new_zeros(*q.shape[:2], v.shape[2])

    def split(x: Tensor) -> Tensor:  # (B, N, C) -> (B, h, N, d)
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    mask = q.new_zeros(len(q), 1, 1, k.shape[1]).scatter(-1, order[:, None, None, :first], float("-inf"))
    return F.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask).transpose(1, 2).flatten(2)


# What runs where, settled once


if _NATIVE is not None:
    _partition.register_kernel("cpu")(_native_partition)

token_partition = _selected if _NATIVE is not None else kernels.token_partition
