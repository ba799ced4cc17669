"""Pooling and resizing of channels-last maps."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["adaptive_avg_pool", "avg_pool", "max_pool", "resize"]


def max_pool(x: Tensor, kernel: int, stride: int, padding: int, ceil_mode: bool = False) -> Tensor:
    """`F.max_pool2d` on (B, H, W, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding, ceil_mode=ceil_mode).permute(0, 2, 3, 1)


def avg_pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """`F.avg_pool2d` on (B, H, W, C); padded places are left out of the mean."""
    x = F.avg_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding, count_include_pad=False)
    return x.permute(0, 2, 3, 1)


def adaptive_avg_pool(x: Tensor, height: int, width: int) -> Tensor:
    """`F.adaptive_avg_pool2d` on (B, H, W, C)."""
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (height, width)).permute(0, 2, 3, 1)


def resize(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    """`F.interpolate` of (B, H, W, C) to a size; bilinear between pixel centres, the corners not aligned."""
    if x.shape[1:3] == (height, width):
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), size=(height, width), mode=mode).permute(0, 2, 3, 1)
