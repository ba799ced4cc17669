"""Convolutional layers on channels-last maps, (B, H, W, C)."""

from torch import Tensor, nn

__all__ = ["AxialConv2d", "BatchNorm2d", "Conv2d", "ConvTranspose2d", "GroupNorm", "Pointwise"]


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` on (B, H, W, C): the permuted view is torch's channels_last format, so nothing is copied."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` on (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class AxialConv2d(nn.Conv2d):
    """A depth-wise convolution of (B, H, W, C) along its height or width."""

    def __init__(self, dim: int, kernel: int, axis: str, stride: int = 1, bias: bool = True):
        size, padding = ((kernel, 1), (kernel // 2, 0)) if axis == "height" else ((1, kernel), (0, kernel // 2))
        super().__init__(dim, dim, size, stride=stride, padding=padding, groups=dim, bias=bias)

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
