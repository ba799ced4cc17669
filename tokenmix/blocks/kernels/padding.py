"""Channels-last maps brought to another size: padded, cropped, resized."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["crop", "pad_to", "resize"]


def is_exporting() -> bool:
    """Whether `torch.export` traces: its program serves maps that need a step and maps that do not: none is skipped."""
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()  # the former came with torch 2.7


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Zeros on the right and bottom of (B, H, W, C) until H and W are multiples of `multiple`."""
    bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if is_exporting() or bottom or right else x


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The upper left `height` x `width` part of (B, H, W, C)."""
    if is_exporting():  # whether a view is contiguous would be noted, and be held against every size
        rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
        return x.index_select(1, rows).index_select(2, columns)
    return x[:, :height, :width]


def resize(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    """`F.interpolate` of (B, H, W, C) to a size; bilinear between pixel centres, the corners not aligned."""
    if not is_exporting() and x.shape[1:3] == (height, width):
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), size=(height, width), mode=mode).permute(0, 2, 3, 1)
