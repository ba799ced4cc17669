"""Pooling of channels-last maps."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["adaptive_avg_pool", "avg_pool", "max_pool"]


def max_pool(x: Tensor, kernel: int, stride: int, padding: int, ceil_mode: bool = False) -> Tensor:
    """`F.max_pool2d` on (B, H, W, C)."""
    if ceil_mode and stride == kernel and padding == 0 and torch.compiler.is_compiling():
        # A trace for unknown sizes cannot tell whether ceil mode's last window starts inside: fill that window up.
        bottom, right = ((side + kernel - 1) // kernel * kernel - side for side in x.shape[1:3])
        x = F.pad(x, (0, 0, 0, right, 0, bottom), value=float("-inf"))
        ceil_mode = False
    return F.max_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding, ceil_mode=ceil_mode).permute(0, 2, 3, 1)


def avg_pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """`F.avg_pool2d` on (B, H, W, C); padded places are left out of the mean."""
    x = F.avg_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding, count_include_pad=False)
    return x.permute(0, 2, 3, 1)


def adaptive_avg_pool(x: Tensor, height: int, width: int) -> Tensor:
    """`F.adaptive_avg_pool2d` on (B, H, W, C)."""
    return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (height, width)).permute(0, 2, 3, 1)
