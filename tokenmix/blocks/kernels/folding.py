"""Overlapping windows of channels-last maps."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["fold", "unfold"]


def unfold(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Zero-padded windows of (B, H, W, C), row by row: (B, n, kernel**2, C)."""
    x = F.pad(x, (0, 0, padding, padding, padding, padding)) if padding else x
    x = x.unfold(1, kernel, stride).unfold(2, kernel, stride)  # (B, rows, columns, C, kernel, kernel)
    return x.permute(0, 1, 2, 4, 5, 3).flatten(3, 4).flatten(1, 2)


def fold(x: Tensor, height: int, width: int, kernel: int, stride: int, padding: int) -> Tensor:
    """Windows (B, n, kernel**2, C) summed into their places on (B, height, width, C)."""
    x = F.fold(x.permute(0, 3, 2, 1).flatten(1, 2), (height, width), kernel, padding=padding, stride=stride)
    return x.permute(0, 2, 3, 1).contiguous()
