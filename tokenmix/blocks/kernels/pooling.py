"""Pooling and resizing of channels-last maps."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["avg_pool", "max_pool", "resize"]


def max_pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """`F.max_pool2d` on (B, H, W, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding).permute(0, 2, 3, 1)


def avg_pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """`F.avg_pool2d` on (B, H, W, C); padded places are left out of the mean."""
    x = F.avg_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding, count_include_pad=False)
    return x.permute(0, 2, 3, 1)


def resize(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    """`F.interpolate` of (B, H, W, C) to a size; bilinear between pixel centres, the corners not aligned."""
    return F.interpolate(x.permute(0, 3, 1, 2), size=(height, width), mode=mode).permute(0, 2, 3, 1)
