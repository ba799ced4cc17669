"""Convolutional layers on channels-last maps, (B, H, W, C)."""

from torch import Tensor, nn

__all__ = ["BatchNorm2d", "Conv2d", "GroupNorm", "Pointwise"]


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` on (B, H, W, C): the permuted view is torch's channels_last format, so nothing is copied."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` on (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Pointwise(nn.Linear):
    """A 1x1 convolution on (..., C), as the matrix product it is."""


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` on (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
