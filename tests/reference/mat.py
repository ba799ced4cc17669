"""MAT-1..5 and the models of its ablations, the naive truth for tests: loops and index arithmetic, no speed.

Source: architectures/mat.md. Section 1 gives `VARIANTS`, stem and head, section 2 the blocks, section 3 the attention,
section 4 the bilinear patch embedding, section 5 the ablations, section 7 padding and dense outputs. The paper is
chapter 4 of "Efficient Vision Transformers with Multi-Scale and Partial Attentions for Object Recognition" (Vo 2023).

Letters: B batch, C channels of a stage, H W map, h heads, d head width, w window side, N windows. Maps are NCHW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MAT", "VARIANTS", "sample_map"]

VARIANTS: dict[str, dict] = {
    "1": {"dim": 24, "depths": (2, 2, 6, 6), "heads": (3, 6, 12, 24)},
    "2": {"dim": 32, "depths": (2, 2, 6, 6), "heads": (2, 4, 8, 16)},
    "3": {"dim": 36, "depths": (2, 2, 8, 8), "heads": (2, 4, 8, 16)},
    "4": {"dim": 48, "depths": (3, 3, 8, 8), "heads": (3, 6, 12, 24)},
    "5": {"dim": 64, "depths": (2, 2, 8, 8), "heads": (4, 8, 16, 32)},
}
_HEAD_WIDTH = 1280


def _per_token(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer that works on the last axis (Linear, LayerNorm) to the channels of a (B, C, H, W) map."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def sample_map(x: Tensor, dx: Tensor, dy: Tensor, border: bool = True) -> Tensor:
    """Bilinear interpolation at the cell centres of an h x w grid moved by dx and dy cells, channel by channel.

    Args:
        x: (B, C, H, W).
        dx, dy: (B, G, h, w), to the right and down; G divides C, neighbouring channels share.
        border: clamp positions to the pixel centres; otherwise the map is zero outside.
    """
    B, C, H, W = x.shape
    G, h, w = dx.shape[1:]
    images = []
    for image in range(B):
        groups = []
        for g in range(G):
            channels = x[image, g * C // G : (g + 1) * C // G]
            # Cell j has its centre at (j + 1/2) / w of the width, pixel k at (k + 1/2) / W.
            s = (torch.arange(w) + 0.5 + dx[image, g]) * W / w - 0.5  # (h, w)
            r = (torch.arange(h).reshape(h, 1) + 0.5 + dy[image, g]) * H / h - 0.5
            if border:
                s, r = s.clamp(0, W - 1), r.clamp(0, H - 1)
            left, top = s.detach().floor().long(), r.detach().floor().long()
            total = torch.zeros(C // G, h, w, dtype=x.dtype)
            for row in (top, top + 1):
                for column in (left, left + 1):
                    weight = (1 - (r - row).abs()) * (1 - (s - column).abs())
                    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
                    total = total + weight * inside * channels[:, row.clamp(0, H - 1), column.clamp(0, W - 1)]
            groups.append(total)
        images.append(torch.cat(groups))
    return torch.stack(images)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T d^-1/2) v of one head, (B, N, d) and (B, M, d)."""
    scores = torch.matmul(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return torch.matmul(weights / weights.sum(dim=-1, keepdim=True), v)


def _heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of (B, N, C) tokens head by head."""
    d = q.shape[-1] // heads
    parts = [slice(h * d, h * d + d) for h in range(heads)]
    return torch.cat([_attend(q[..., p], k[..., p], v[..., p]) for p in parts], dim=-1)


class Stem(nn.Module):
    """Section 1: 3x3 s2 to C/2, depth-wise 3x3, 3x3 s2 to C; each with BatchNorm, GELU after the first two."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.conv = nn.ModuleList(
            [
                nn.Conv2d(3, half, 3, 2, 1),
                nn.Conv2d(half, half, 3, 1, 1, groups=half),
                nn.Conv2d(half, dim, 3, 2, 1),
            ]
        )
        self.norm = nn.ModuleList([nn.BatchNorm2d(half), nn.BatchNorm2d(half), nn.BatchNorm2d(dim)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm[0](self.conv[0](x)))
        x = F.gelu(self.norm[1](self.conv[1](x)))
        return self.norm[2](self.conv[2](x))


class BilinearPE(nn.Module):
    """Section 4."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.offset_dw = nn.Conv2d(dim, dim, 3, 2, 1, groups=dim, bias=False)
        self.offset_pw = nn.Conv2d(dim, 2, 1, bias=False)
        self.feature_dw = nn.Conv2d(dim, dim, 3, 2, 1, groups=dim)
        self.pw = nn.Conv2d(dim, 2 * dim, 1)
        self.pw_bn = nn.BatchNorm2d(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = _per_token(self.norm, x)
        offsets = self.offset_pw(self.offset_dw(x))
        f = sample_map(self.feature_dw(x), offsets[:, :1], offsets[:, 1:])
        return self.pw_bn(self.pw(f))


class ConvPE(nn.Module):
    """Section 5, the 3x3 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, 2 * dim, 3, 2, 1)
        self.conv_bn = nn.BatchNorm2d(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_bn(self.conv(_per_token(self.norm, x)))


class PatchMerging(nn.Module):
    """Section 5, Swin's patch merging; section 7, odd sides."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = torch.cat([x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]], dim=1)
        return _per_token(self.reduction, _per_token(self.norm, x))


class Mixing(nn.Module):
    """Section 3, step 3: multi-head self-attention of (B, N, C) abstract tokens."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, a: Tensor) -> Tensor:
        q, k, v = self.qkv(a).split(a.shape[-1], dim=-1)
        return self.out(_heads(q, k, v, self.heads))


class MATAttention(nn.Module):
    """Section 3; with `abstract=False` the window attention of section 5."""

    def __init__(self, dim: int, heads: int, window: int, abstract: bool) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.abstract = abstract
        if abstract:
            self.token = nn.Parameter(torch.zeros(1, heads, 1, dim // heads))
            self.mixing = Mixing(dim, heads)
            self.fusion_kv = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        w = self.window
        x = F.pad(x, (0, -W % w, 0, -H % w))
        q, k, v = _per_token(self.qkv, x).split(C, dim=1)
        corners = [(top, left) for top in range(0, x.shape[2], w) for left in range(0, x.shape[3], w)]
        asked, local, tokens = [], [], []
        for top, left in corners:
            qw, kw, vw = (
                m[:, :, top : top + w, left : left + w].reshape(B, C, w * w).transpose(1, 2) for m in (q, k, v)
            )
            asked.append(qw)
            if self.abstract:
                token = self.token.reshape(1, 1, C).expand(B, 1, C)  # heads lie side by side
                both = _heads(torch.cat([qw, token], dim=1), kw, vw, self.heads)
                local.append(both[:, : w * w])
                tokens.append(both[:, w * w :])
            else:
                local.append(_heads(qw, kw, vw, self.heads))
        if self.abstract:
            mixed = self.mixing(torch.cat(tokens, dim=1))  # (B, N, C)
            kf, vf = self.fusion_kv(mixed).split(C, dim=-1)
            local = [x + _heads(qw, kf, vf, self.heads) for x, qw in zip(local, asked, strict=True)]
        y = torch.zeros_like(x)
        for (top, left), part in zip(corners, local, strict=True):
            y[:, :, top : top + w, left : left + w] = part.transpose(1, 2).reshape(B, C, w, w)
        return _per_token(self.out, y[:, :, :H, :W])


class MLP(nn.Module):
    """Section 2."""

    def __init__(self, dim: int, expand: int, conv: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, expand * dim)
        self.dw = nn.Conv2d(expand * dim, expand * dim, 3, 1, 1, groups=expand * dim) if conv else nn.Identity()
        self.fc2 = nn.Linear(expand * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return _per_token(self.fc2, F.gelu(self.dw(_per_token(self.fc1, x))))


class Block(nn.Module):
    """Section 2: a MAT block, or without `mixer` an MLP-only block. No drop path."""

    def __init__(
        self, dim: int, heads: int, window: int, mixer: bool, abstract: bool, expand: int, hidden_conv: bool
    ) -> None:
        super().__init__()
        self.mixer = mixer
        if mixer:
            self.cpe = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)
            self.norm1 = nn.LayerNorm(dim)
            self.attn = MATAttention(dim, heads, window, abstract)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, expand, hidden_conv)

    def forward(self, x: Tensor) -> Tensor:
        if self.mixer:
            x = x + self.cpe(x)
            x = x + self.attn(_per_token(self.norm1, x))
        return x + self.mlp(_per_token(self.norm2, x))


class MAT(nn.Module):
    """MAT classifier, or with `dense=True` the four stage outputs and no head.

    Args:
        dim, depths, heads: channels of the first stage, blocks and heads of the four stages.
        window, expand: side of a window, width of the perceptron.
        mixer_from: first stage, from 0, whose blocks have a token mixer.
        abstract: MAT attention; otherwise window attention.
        embedding: "bilinear", "convolution" or "merging".
        hidden_conv: whether the perceptron holds a depth-wise convolution.
    """

    def __init__(
        self,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int = 7,
        expand: int = 4,
        mixer_from: int = 2,
        abstract: bool = True,
        embedding: str = "bilinear",
        hidden_conv: bool = True,
        num_classes: int = 1000,
        dense: bool = False,
    ) -> None:
        super().__init__()
        embeddings = {"bilinear": BilinearPE, "convolution": ConvPE, "merging": PatchMerging}
        self.stem = Stem(dim)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(dim * 2**i, heads[i], window, i >= mixer_from, abstract, expand, hidden_conv)
                    for _ in range(depths[i])
                )
            )
            for i in range(4)
        )
        self.pe = nn.ModuleList(embeddings[embedding](dim * 2**i) for i in range(3))
        self.dense = dense
        if not dense:
            self.norm = nn.LayerNorm(8 * dim)
            self.proj = nn.Conv2d(8 * dim, _HEAD_WIDTH, 1)
            self.bn = nn.BatchNorm2d(_HEAD_WIDTH)
            self.head = nn.Linear(_HEAD_WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        x = self.stem(images)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.pe[i - 1](x))
            maps.append(x)
        if self.dense:
            return maps
        x = F.gelu(self.bn(self.proj(_per_token(self.norm, x))))
        return self.head(x.mean(dim=(2, 3)))
