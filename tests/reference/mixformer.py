"""MixFormer B0..B6, the naive truth for tests: one obvious line per step of the dossier, no speed.

Source: architectures/mixformer.md. Section 1 gives `VARIANTS`, section 2 the layers, section 3 the padding, section 4
the initialisation, section 6 the attribute names, section 7 the detection backbone (`dense=True`). The paper is
"MixFormer: Mixing Features across Windows and Dimensions" (CVPR 2022). Where paper and released code differ the code is
followed (section 8). One training detail is left out: the original updates the running variance with the biased batch
variance, `torch.nn.BatchNorm2d` with the unbiased one (section 5).

Letters: B batch, C channels of a stage, D = C/2 attention channels, H W map, h heads, d head width, w window side,
N = w*w tokens of a window, K kernel of the depth-wise convolution. Maps are NCHW everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VARIANTS", "MixFormer", "MixingAttention", "MixingBlock", "relative_position_index", "window_attention"]

VARIANTS: dict[str, dict] = {
    "B0": {"dims": (24, 48, 96, 192), "depths": (1, 2, 6, 6), "heads": (3, 6, 12, 24), "drop_path": 0.0},
    "B1": {"dims": (32, 64, 128, 256), "depths": (1, 2, 6, 6), "heads": (2, 4, 8, 16), "drop_path": 0.0},
    "B2": {"dims": (32, 64, 128, 256), "depths": (2, 2, 8, 8), "heads": (2, 4, 8, 16), "drop_path": 0.05},
    "B3": {"dims": (48, 96, 192, 384), "depths": (2, 2, 8, 6), "heads": (3, 6, 12, 24), "drop_path": 0.1},
    "B4": {"dims": (64, 128, 256, 512), "depths": (2, 2, 8, 8), "heads": (4, 8, 16, 32), "drop_path": 0.2},
    "B5": {"dims": (96, 192, 384, 768), "depths": (1, 2, 8, 6), "heads": (6, 12, 24, 48), "drop_path": 0.3},
    "B6": {"dims": (96, 192, 384, 768), "depths": (2, 4, 16, 12), "heads": (6, 12, 24, 48), "drop_path": 0.5},
}

# Section 2, head: width of `last_proj`, the same in all variants.
_HEAD_WIDTH = 1280


def _per_token(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer that works on the last axis (Linear, LayerNorm) to the channels of a (B, C, H, W) map."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@functools.cache
def relative_position_index(window: int) -> tuple[tuple[int, ...], ...]:
    """Row of the bias table for every (query, key) pair of a window; tokens are row-major.

    Kept as plain integers and not as a cached tensor: a tensor would remember the device and the inference mode of its
    first use.

    Returns:
        N tuples of N integers in [0, (2w-1)^2); entry [query][key].

    Source: dossier section 2, "Relative position bias".
    """
    rows = []
    for query in range(window * window):
        query_h, query_w = query // window, query % window
        row = []
        for key in range(window * window):
            key_h, key_w = key // window, key % window
            row.append((query_h - key_h + window - 1) * (2 * window - 1) + (query_w - key_w + window - 1))
        rows.append(tuple(row))
    return tuple(rows)


def window_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int) -> Tensor:
    """Softmax attention inside each w x w window, one window after the other.

    Args:
        q, k, v: maps (B, D, H, W); channel h*d + j is channel j of head h; H and W are multiples of `window`. q is not
            scaled yet.
        bias: added to the scores, (h, N, N) as [head, query, key].
        window: side of a window, tokens.

    Returns:
        (B, D, H, W), heads concatenated in the channel order of the inputs.

    Source: dossier section 2, step a4.
    """
    B, D, H, W = q.shape
    heads = bias.shape[0]
    head_width = D // heads
    bands = []
    for top in range(0, H, window):
        windows = []
        for left in range(0, W, window):
            area = (slice(None), slice(None), slice(top, top + window), slice(left, left + window))
            query = q[area].reshape(B, heads, head_width, window * window).transpose(2, 3)  # (B, h, N, d)
            key = k[area].reshape(B, heads, head_width, window * window).transpose(2, 3)  # (B, h, N, d)
            value = v[area].reshape(B, heads, head_width, window * window).transpose(2, 3)  # (B, h, N, d)
            scores = torch.matmul(query * head_width**-0.5, key.transpose(2, 3)) + bias  # (B, h, N, N)
            mixed = torch.matmul(torch.softmax(scores, dim=-1), value)  # (B, h, N, d)
            windows.append(mixed.transpose(2, 3).reshape(B, D, window, window))
        bands.append(torch.cat(windows, dim=3))  # (B, D, w, W)
    return torch.cat(bands, dim=2)  # (B, D, H, W)


class DropPath(nn.Module):
    """Zero a residual branch for whole samples, with probability `rate`, and divide the kept ones by 1 - rate."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device) >= self.rate  # (B, 1, 1, 1)
        return x * kept / (1.0 - self.rate)


class PatchEmbed(nn.Module):
    """Image to the first map, output stride 4: three 3x3 convolutions at C0/2, one 2x2 to C0, LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, half, 3, stride=2, padding=1), nn.BatchNorm2d(half), nn.GELU(),
            nn.Conv2d(half, half, 3, stride=1, padding=1), nn.BatchNorm2d(half), nn.GELU(),
            nn.Conv2d(half, half, 3, stride=1, padding=1), nn.BatchNorm2d(half), nn.GELU(),
        )  # fmt: skip
        self.proj = nn.Conv2d(half, dim, 2, stride=2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        H, W = images.shape[2:]
        images = F.pad(images, (0, -W % 4, 0, -H % 4))  # right and bottom
        x = self.proj(self.stem(images))  # (B, C0, ceil(H/4), ceil(W/4))
        return _per_token(self.norm, x)


class MixingAttention(nn.Module):
    """MIX of dossier section 2: window attention and depth-wise convolution side by side, each gating the other."""

    def __init__(self, dim: int, heads: int, window: int, kernel: int) -> None:
        super().__init__()
        half = dim // 2
        spatial = dim // 16
        self.heads = heads
        self.window = window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.normal_(self.relative_position_bias_table, std=0.02)
        self.proj_attn = nn.Linear(dim, half)
        self.proj_attn_norm = nn.LayerNorm(half)
        self.proj_cnn = nn.Linear(dim, dim)
        self.proj_cnn_norm = nn.LayerNorm(dim)
        self.dwconv3x3 = nn.Sequential(
            nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim), nn.BatchNorm2d(dim), nn.GELU()
        )
        self.channel_interaction = nn.Sequential(
            nn.Conv2d(dim, dim // 8, 1), nn.BatchNorm2d(dim // 8), nn.GELU(), nn.Conv2d(dim // 8, half, 1)
        )
        self.projection = nn.Conv2d(dim, half, 1)
        self.conv_norm = nn.BatchNorm2d(half)
        self.qkv = nn.Linear(half, 3 * half)
        self.spatial_interaction = nn.Sequential(
            nn.Conv2d(half, spatial, 1), nn.BatchNorm2d(spatial), nn.GELU(), nn.Conv2d(spatial, 1, 1)
        )
        self.attn_norm = nn.LayerNorm(half)
        self.proj = nn.Linear(dim, dim)

    def position_bias(self) -> Tensor:
        """Bias as [head, query, key], (h, N, N)."""
        table = self.relative_position_bias_table
        index = torch.tensor(relative_position_index(self.window), device=table.device)  # (N, N)
        return table[index].permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map whose sides are multiples of the window: (B, C, H, W) to (B, C, H, W)."""
        half = x.shape[1] // 2
        attention = _per_token(self.proj_attn_norm, _per_token(self.proj_attn, x))  # a1: (B, D, H, W)
        conv = _per_token(self.proj_cnn_norm, _per_token(self.proj_cnn, x))  # c1: (B, C, H, W)
        conv = self.dwconv3x3(conv)  # c2: (B, C, H, W)
        pooled = conv.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1), padding counted
        channel_gate = torch.sigmoid(self.channel_interaction(pooled))  # ci: (B, D, 1, 1)
        conv = self.projection(conv)  # c3: (B, D, H, W)
        q, k, v = _per_token(self.qkv, attention).split(half, dim=1)  # a2: three of (B, D, H, W)
        v = v * channel_gate  # a3
        attention = window_attention(q, k, v, self.position_bias(), self.window)  # a4: (B, D, H, W)
        spatial_gate = torch.sigmoid(self.spatial_interaction(attention))  # si: (B, 1, H, W)
        conv = self.conv_norm(conv * spatial_gate)  # c4: (B, D, H, W)
        attention = _per_token(self.attn_norm, attention)  # a5: (B, D, H, W)
        return _per_token(self.proj, torch.cat([attention, conv], dim=1))  # out: (B, C, H, W)


class Mlp(nn.Module):
    """Linear C -> 4C, GELU, linear 4C -> C on every token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return _per_token(self.fc2, F.gelu(_per_token(self.fc1, x)))


class MixingBlock(nn.Module):
    """y = x + crop(MIX(pad(LN x))), then y + MLP(LN y); both branches under drop path."""

    def __init__(self, dim: int, heads: int, window: int, kernel: int, drop_path: float) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim)
        self.attn = MixingAttention(dim, heads, window, kernel)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        mixed = _per_token(self.norm1, x)  # (B, C, H, W)
        mixed = F.pad(mixed, (0, -W % self.window, 0, -H % self.window))  # right and bottom, after the norm
        mixed = self.attn(mixed)[:, :, :H, :W]
        x = x + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(_per_token(self.norm2, x)))


class Downsample(nn.Module):
    """BatchNorm, then a 2x2 stride-2 convolution to the next width; both sides must be even."""

    def __init__(self, dim: int, next_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.reduction = nn.Conv2d(dim, next_dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        if H % 2 or W % 2:
            raise ValueError(f"downsampling needs an even map, got {H} x {W}; image sides must be 32k-3 .. 32k")
        return self.reduction(self.norm(x))  # (B, C_next, H/2, W/2)


class Stage(nn.Module):
    """Mixing Blocks of one width; `downsample` is run by the model, after the stage's output was taken."""

    def __init__(
        self, dim: int, next_dim: int | None, heads: int, window: int, kernel: int, drop_paths: Sequence[float]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MixingBlock(dim, heads, window, kernel, rate) for rate in drop_paths])
        self.downsample = None if next_dim is None else Downsample(dim, next_dim)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class MixFormer(nn.Module):
    """MixFormer classifier, or with `dense=True` the four normed stage outputs and no head.

    Args:
        dims, depths, heads: channels, Mixing Blocks and attention heads of the four stages.
        drop_path: rate of the last block; the ramp starts at 0 in the first one.
        window: side of an attention window, tokens.
        kernel: side of the depth-wise kernel, odd.
        num_classes: outputs of `head`; 0 or less leaves the 1280 pooled features.
        dense: drop `norm`, `last_proj` and `head`, add one LayerNorm per stage output (`norms`).

    Shape: images (B, 3, H, W) with each side in 32k-3 .. 32k.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        drop_path: float = 0.0,
        window: int = 7,
        kernel: int = 3,
        num_classes: int = 1000,
        dense: bool = False,
    ) -> None:
        super().__init__()
        total = sum(depths)
        rates = [drop_path * index / max(total - 1, 1) for index in range(total)]
        self.patch_embed = PatchEmbed(dims[0])
        self.layers = nn.ModuleList()
        first = 0
        for stage in range(4):
            next_dim = dims[stage + 1] if stage < 3 else None
            stage_rates = rates[first : first + depths[stage]]
            self.layers.append(Stage(dims[stage], next_dim, heads[stage], window, kernel, stage_rates))
            first += depths[stage]
        self.dense = dense
        if dense:
            self.norms = nn.ModuleList([nn.LayerNorm(dim) for dim in dims])
        else:
            self.norms = None
            self.norm = nn.LayerNorm(dims[3])
            self.last_proj = nn.Linear(dims[3], _HEAD_WIDTH)
            self.head = nn.Linear(_HEAD_WIDTH, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(_initialise)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Four maps (B, C_i, H_i, W_i), each after its blocks and before downsampling; normed if there are `norms`."""
        x = self.patch_embed(images)
        outputs = []
        for index, stage in enumerate(self.layers):
            x = stage(x)
            outputs.append(x if self.norms is None else _per_token(self.norms[index], x))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, num_classes); with `dense` the list of `forward_features`."""
        features = self.forward_features(images)
        if self.dense:
            return features
        x = _per_token(self.norm, features[3])  # (B, C3, H, W)
        x = F.gelu(_per_token(self.last_proj, x))  # (B, 1280, H, W); GELU per token, before the mean
        return self.head(x.mean(dim=(2, 3)))


def _initialise(module: nn.Module) -> None:
    """Section 4. Norm layers keep the PyTorch default, which is the one wanted: weight 1, bias 0.

    The truncation of the original cuts at +-2, which is 100 standard deviations: left out, here and for the tables.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        # full input channels, also for the depth-wise convolution
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / (module.kernel_size[0] ** 2 * module.in_channels)))
        nn.init.zeros_(module.bias)
