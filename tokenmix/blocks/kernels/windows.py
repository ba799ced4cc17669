"""Squares of channels-last maps: windows of tokens, and pixels stacked along the channels."""

import math

from torch import Tensor

__all__ = ["space_to_depth", "window_merge", "window_partition"]


def window_partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) to windows row by row, (B, n, window**2, C)."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))  # (B, rows, w, columns, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def window_merge(x: Tensor, height: int, width: int) -> Tensor:
    """Windows (B, n, w * w, C) back in their places on (B, height, width, C)."""
    w = math.isqrt(x.shape[2])
    x = x.unflatten(2, (w, w)).unflatten(1, (height // w, width // w))  # (B, rows, columns, w, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def space_to_depth(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) to (B, H/side, W/side, side**2 * C), channel (column * side + row) * C + c."""
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, rows, row, columns, column, C)
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3)
