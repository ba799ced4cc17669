"""PartialFormer B0..B4, the naive truth for tests: one obvious line per step of the dossier, no speed.

Source: architectures/partialformer.md. Section 1 gives `VARIANTS`, stem, downsampling and head, section 2 the block,
section 3 partial attention. The model is that of chapter 5 of "Efficient Vision Transformers with Multi-Scale and
Partial Attentions for Object Recognition" (Vo 2023), as far as its printed figures tell.

Letters: B batch, d channels, H W map, N tokens, h heads, e head expansion. Maps are NCHW, tokens (N, d) of one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["VARIANTS", "PartialAttention", "PartialFormer", "foreground_count"]

VARIANTS: dict[str, dict] = {
    "B0": {"dim": 24, "depths": (2, 2, 6, 6), "heads": (2, 4, 8, 16)},
    "B1": {"dim": 32, "depths": (2, 2, 6, 6), "heads": (2, 4, 8, 16)},
    "B2": {"dim": 48, "depths": (2, 2, 8, 8), "heads": (3, 6, 12, 24)},
    "B3": {"dim": 64, "depths": (2, 2, 8, 8), "heads": (4, 8, 16, 32)},
    "B4": {"dim": 96, "depths": (2, 2, 8, 6), "heads": (6, 12, 24, 48)},
}
SHARES = (Fraction(1, 64), Fraction(1, 16), Fraction(1, 5), Fraction(2, 5))


def foreground_count(tokens: int, share: Fraction) -> int:
    """N_F of section 3: the share of the tokens, rounded half up, at least 1."""
    return max(1, math.floor(tokens * share + Fraction(1, 2)))


def channels_last(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PartialAttention(nn.Module):
    """Section 3, image by image and head by head."""

    def __init__(self, dim: int, heads: int, share: Fraction, head_expand: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.share = share
        self.query_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.head_fc1 = nn.Linear(heads, head_expand * heads)
        self.head_fc2 = nn.Linear(head_expand * heads, heads)
        self.w_o = nn.Linear(dim, dim)
        self.channel_fc1 = nn.Linear(dim, hidden)
        self.channel_norm = nn.LayerNorm(hidden)
        self.channel_fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Normed tokens (B, N, d) and the tokens before the norm, to (B, N, d)."""
        return torch.stack([self.one_image(x[b], t[b]) for b in range(len(x))])

    def one_image(self, x: Tensor, t: Tensor) -> Tensor:
        N, d = x.shape
        width = d // self.heads
        scores = t.detach().mean(dim=1).tolist()  # step 1
        order = sorted(range(N), key=lambda i: (-scores[i], i))  # step 2
        count = foreground_count(N, self.share)
        front = x[order[:count]]  # step 3: X_F
        back = x[order[count:]]  # X_B
        q, k, v = self.qkv(torch.cat([self.query_token[0], front])).split(d, dim=1)  # steps 4 and 5

        # Step 6, MMSA.
        def head(y: Tensor, h: int) -> Tensor:
            return y[:, h * width : (h + 1) * width]

        similarity = [head(q, h) @ head(k, h).T / math.sqrt(width) for h in range(self.heads)]
        wide = [
            sum(self.head_fc1.weight[o, h] * similarity[h] for h in range(self.heads)) + self.head_fc1.bias[o]
            for o in range(self.head_fc1.out_features)
        ]
        wide = [torch.softmax(s, dim=1) for s in wide]
        weights = [
            sum(self.head_fc2.weight[h, o] * wide[o] for o in range(len(wide))) + self.head_fc2.bias[h]
            for h in range(self.heads)
        ]
        mixed = self.w_o(torch.cat([weights[h] @ head(v, h) for h in range(self.heads)], dim=1))
        query, front_out = mixed[:1], mixed[1:]
        if count == N:  # N_B = 0
            back_out = back
        else:
            # Step 7, SQA.
            _, k, v = self.qkv(back).split(d, dim=1)
            answers = []
            for h in range(self.heads):
                attention = torch.softmax(head(query, h) @ head(k, h).T / math.sqrt(width), dim=1)  # (1, N_B)
                answers.append(attention @ head(v, h))
            y = torch.cat(answers, dim=1)  # (1, d)
            # Step 8, ChannelMLP, added to every row.
            back_out = back + self.channel_fc2(F.relu(self.channel_norm(self.channel_fc1(y))))
        # Step 9.
        result: list[Tensor] = [x[0]] * N
        for place, row in zip(order, [*front_out, *back_out], strict=True):
            result[place] = row
        return torch.stack(result)


class Block(nn.Module):
    """Section 2. With `cpe` 7 and no hidden convolution it is the literal alternative."""

    def __init__(
        self, dim: int, heads: int, share: Fraction, head_expand: int, hidden: int, cpe: int, hidden_conv: bool
    ) -> None:
        super().__init__()
        self.cpe = nn.Conv2d(dim, dim, cpe, padding=cpe // 2, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = PartialAttention(dim, heads, share, head_expand, hidden)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.conv = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim) if hidden_conv else None
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        x = x + self.cpe(x)
        t = x.flatten(2).transpose(1, 2)  # (B, N, d), row-major
        t = t + self.attn(self.norm1(t), t)
        x = t.transpose(1, 2).unflatten(2, (H, W))
        y = self.fc1(channels_last(self.norm2, x))
        y = y if self.conv is None else self.conv(y)
        return x + self.fc2(F.gelu(y))


class PartialFormer(nn.Module):
    """The classifier, or with `dense=True` the four stage maps and no head.

    Args:
        dim, depths, heads: channels of the first stage, blocks and heads of every stage.
        head_expand, reduction, min_hidden: e, and the hidden width m = max(min_hidden, d // reduction).
        shares: share of the foreground, stage by stage.

    Shape: images (B, 3, H, W) of any size.
    """

    def __init__(
        self,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        head_expand: int = 2,
        reduction: int = 32,
        min_hidden: int = 8,
        shares: Sequence[Fraction] = SHARES,
        cpe: int = 3,
        hidden_conv: bool = True,
        num_classes: int = 1000,
        dense: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim), nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.BatchNorm2d(dim), nn.GELU(),
            nn.Conv2d(dim, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim),
        )  # fmt: skip
        self.stages = nn.ModuleList()
        self.downs = nn.ModuleList()
        self.down_norms = nn.ModuleList()
        for i in range(4):
            d = dim * 2**i
            hidden = max(min_hidden, d // reduction)
            self.stages.append(
                nn.Sequential(
                    *(Block(d, heads[i], shares[i], head_expand, hidden, cpe, hidden_conv) for _ in range(depths[i]))
                )
            )
            if i < 3:
                self.downs.append(nn.Conv2d(d, 2 * d, 3, stride=2, padding=1))
                self.down_norms.append(nn.LayerNorm(2 * d))
        self.dense = dense
        if not dense:
            self.norm = nn.LayerNorm(8 * dim)
            self.proj = nn.Conv2d(8 * dim, 1280, 1)
            self.proj_norm = nn.BatchNorm2d(1280)
            self.head = nn.Linear(1280, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Four maps (B, C_i, H_i, W_i), each after its blocks; no norms."""
        x = self.stem(images)
        outputs = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = channels_last(self.down_norms[i - 1], self.downs[i - 1](x))
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, num_classes); with `dense` the list of `forward_features`."""
        features = self.forward_features(images)
        if self.dense:
            return features
        x = F.gelu(self.proj_norm(self.proj(channels_last(self.norm, features[3]))))  # (B, 1280, H, W)
        return self.head(x.mean(dim=(2, 3)))
