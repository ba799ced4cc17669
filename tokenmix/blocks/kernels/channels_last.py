"""Convolutional layers on channels-last maps, (B, H, W, C)."""

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "AxialConv2d",
    "BatchNorm2d",
    "Conv2d",
    "ConvTranspose2d",
    "FusedConv2d",
    "FusedLinear",
    "FusedPointwise",
    "GroupNorm",
    "Pointwise",
]


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


class Fused(nn.Module):
    """Mixed into a layer: an activation behind it, by its name in `torch.nn.functional`."""

    def __init__(self, *sizes: int, activation: str, **settings):
        super().__init__(*sizes, **settings)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return getattr(F, self.activation)(super().forward(x))


class FusedConv2d(Fused, Conv2d):
    """`Conv2d` and an activation."""


class FusedLinear(Fused, nn.Linear):
    """`nn.Linear` and an activation."""


class FusedPointwise(Fused, Pointwise):
    """`Pointwise` and an activation."""
