"""Learned positions, and moving a map."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PositionEmbedding", "roll"]


class PositionEmbedding(nn.Module):
    """Add a learned vector to every position of a (B, H, W, C) map.

    Args:
        channels: C.
        height, width: size of the maps that `table`, (height * width, C), is for; it is resized for others.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.height = height
        self.width = width
        self.table = nn.Parameter(torch.zeros(height * width, channels))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        table = self.table.unflatten(0, (self.height, self.width))
        if size != (self.height, self.width):
            # Half precision has no bicubic interpolation.
            wide = table.to(torch.promote_types(table.dtype, torch.float32)).permute(2, 0, 1)[None]
            wide = F.interpolate(wide, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
            table = wide.to(table.dtype)
        return x + table

    def extra_repr(self) -> str:
        return f"{self.table.shape[1]}, height={self.height}, width={self.width}"


def roll(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, H, W, C) moved down and right; what leaves on one side comes back on the other."""
    return torch.roll(x, (rows, columns), (1, 2)) if rows or columns else x
