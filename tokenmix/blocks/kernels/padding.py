"""Padding of channels-last maps."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["pad_to"]


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Zeros on the right and bottom of (B, H, W, C) until H and W are multiples of `multiple`."""
    bottom, right = -x.shape[1] % multiple, -x.shape[2] % multiple
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x
