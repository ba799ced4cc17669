"""Variants of MixFormer and ATMNet from the papers' ablations, the naive truth for tests: the references with one part
exchanged.

Sources: MixFormer (CVPR 2022), tables 7 and 9; Active Token Mixer (AAAI 2023), figure 2. The papers show these variants
and do not spell them out; what is filled in is said in each class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import atmnet, mixformer

__all__ = ["Gated", "PlaneATMNet", "Shifted", "Successive", "ThreeTapATMNet"]


def _per_token(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# MixFormer


class Gated(mixformer.MixFormer):
    """MixFormer with only the gates in `gates` ("channel", "spatial"); the others are 1 everywhere."""

    def __init__(self, *, gates: set[str], **options) -> None:
        super().__init__(**options)
        for stage in self.layers:
            for block in stage.blocks:
                # The sigmoid of a large number is exactly 1.
                if "channel" not in gates:
                    block.attn.channel_interaction = _Large()
                if "spatial" not in gates:
                    block.attn.spatial_interaction = _Large()


class _Large(nn.Module):
    """1000 in every place: of one channel, so that it spreads over any number of them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x[:, :1], 1000.0)


class _SuccessiveAttention(nn.Module):
    """Window attention at full width and a linear layer, then depth-wise convolution, batch norm, GELU (assumed)."""

    def __init__(self, dim: int, heads: int, window: int, kernel: int) -> None:
        super().__init__()
        self.window = window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dwconv = nn.Sequential(
            nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim), nn.BatchNorm2d(dim), nn.GELU()
        )

    position_bias = mixformer.MixingAttention.position_bias

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = _per_token(self.qkv, x).split(x.shape[1], dim=1)
        x = mixformer.window_attention(q, k, v, self.position_bias(), self.window)
        return self.dwconv(_per_token(self.proj, x))


class Successive(mixformer.MixFormer):
    """MixFormer with attention and convolution in series and no interactions."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        for stage, dim, heads in zip(self.layers, options["dims"], options["heads"], strict=True):
            for block in stage.blocks:
                block.attn = _SuccessiveAttention(dim, heads, window=7, kernel=3)


def _shifted_window_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, window: int, shift: int) -> Tensor:
    """Attention among the tokens of a window of the rolled map that are neighbours on the map itself.

    The map was rolled by `shift` up and left, save along a side of a single window. Two tokens of a window see each
    other if neither or both of them were carried around the edge, for rows and columns alike.
    """
    B, D, H, W = q.shape
    heads, d = bias.shape[0], D // bias.shape[0]
    out = torch.empty_like(q)
    for top in range(0, H, window):
        for left in range(0, W, window):
            places = [(top + i, left + j) for i in range(window) for j in range(window)]
            carried = [(window < H and i >= H - shift, window < W and j >= W - shift) for i, j in places]
            rows, columns = [i for i, _ in places], [j for _, j in places]
            query, key, value = (t[:, :, rows, columns].reshape(B, heads, d, -1).transpose(2, 3) for t in (q, k, v))
            scores = query @ key.transpose(2, 3) * d**-0.5 + bias
            for a, from_a in enumerate(carried):
                for b, from_b in enumerate(carried):
                    if from_a != from_b:
                        scores[:, :, a, b] -= 100.0
            mixed = torch.softmax(scores, dim=-1) @ value
            out[:, :, rows, columns] = mixed.transpose(2, 3).reshape(B, D, -1)
    return out


class _ShiftedBlock(mixformer.MixingBlock):
    """A Mixing Block on the map rolled by half a window (assumed: both branches see the rolled map)."""

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        w, half = self.window, self.window // 2
        mixed = F.pad(_per_token(self.norm1, x), (0, -W % w, 0, -H % w))
        shifts = (half if w < H else 0, half if w < W else 0)
        mixed = torch.roll(mixed, (-shifts[0], -shifts[1]), dims=(2, 3))
        mixed = self._attend(mixed, half)
        mixed = torch.roll(mixed, shifts, dims=(2, 3))[:, :, :H, :W]
        x = x + mixed
        return x + self.mlp(_per_token(self.norm2, x))

    def _attend(self, x: Tensor, shift: int) -> Tensor:
        plain = mixformer.window_attention
        mixformer.window_attention = lambda *arguments: _shifted_window_attention(*arguments, shift)
        try:
            return self.attn(x)
        finally:
            mixformer.window_attention = plain


class Shifted(mixformer.MixFormer):
    """MixFormer with shifted windows in every second block of a stage (assumed: the second, fourth, ...)."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        for stage in self.layers:
            for block in stage.blocks[1::2]:
                block.__class__ = _ShiftedBlock


# ATMNet


def _sample_plane(x: Tensor, horizontal: Tensor, vertical: Tensor) -> Tensor:
    """Every element read at its own place plus two distances, bilinearly, zeros outside; all of them (B, C, H, W)."""
    B, C, H, W = x.shape
    row = torch.arange(H, dtype=x.dtype).reshape(H, 1) + vertical
    column = torch.arange(W, dtype=x.dtype) + horizontal
    batch, channel = torch.meshgrid(torch.arange(B), torch.arange(C), indexing="ij")
    batch, channel = batch[:, :, None, None], channel[:, :, None, None]
    result = torch.zeros_like(x)
    for a in (0, 1):
        for b in (0, 1):
            i, j = row.detach().floor() + a, column.detach().floor() + b
            inside = (i >= 0) & (i < H) & (j >= 0) & (j < W)
            read = x[batch, channel, i.clamp(0, H - 1).long(), j.clamp(0, W - 1).long()]
            result = result + inside * read * (1 - (row - i).abs()) * (1 - (column - j).abs())
    return result


class _PlaneATM(nn.Module):
    """One token anywhere on the map and the token itself, fused (all of it assumed)."""

    def __init__(self, channels: int, channels_per_offset: int) -> None:
        super().__init__()
        self.channels_per_offset = channels_per_offset
        self.atm_a = nn.Conv2d(channels, channels, 1)
        self.atm_c = nn.Linear(channels, channels, bias=False)
        self.fusion = atmnet.Mlp(channels, channels // 4, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        B, C, _, _ = x.shape
        horizontal, vertical = (o.repeat_interleave(self.channels_per_offset, dim=1) for o in offsets.chunk(2, dim=1))
        a = self.atm_a(_sample_plane(x, horizontal, vertical))
        c = _per_token(self.atm_c, x)
        weights = torch.softmax(self.fusion((a + c).mean(dim=(2, 3))).reshape(B, C, 2), dim=2)[..., None, None]
        return _per_token(self.proj, weights[:, :, 0] * a + weights[:, :, 1] * c)


class PlaneATMNet(atmnet.ATMNet):
    """ATMNet whose channels read one token anywhere on the map."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        settings = zip(self.blocks, options["channels"], options["channels_per_offset"], strict=True)
        for stage, channels, share in settings:
            for block in stage:
                block.atm = _PlaneATM(channels, share)


class _ThreeTapATM(atmnet.ATM):
    """Three tokens per direction, each with weights of its own (assumed: offsets in the order w1 w2 w3 h1 h2 h3)."""

    def __init__(self, channels: int, channels_per_offset: int) -> None:
        super().__init__(channels, channels_per_offset)
        self.atm_w = nn.Conv2d(3 * channels, channels, 1)
        self.atm_h = nn.Conv2d(3 * channels, channels, 1)

    def sample(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        taps = [o.repeat_interleave(self.channels_per_offset, dim=1) for o in offsets.chunk(6, dim=1)]
        along_w = [atmnet.sample_axis(x, tap, 3) for tap in taps[:3]]
        along_h = [atmnet.sample_axis(x, tap, 2) for tap in taps[3:]]
        return torch.cat(along_w, dim=1), torch.cat(along_h, dim=1)


class ThreeTapATMNet(atmnet.ATMNet):
    """ATMNet whose channels read three tokens per direction."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        settings = zip(self.blocks, options["channels"], options["channels_per_offset"], strict=True)
        for stage, channels, share in settings:
            for block in stage:
                block.atm = _ThreeTapATM(channels, share)
                if block.offset_layer is not None:
                    block.offset_layer[1] = nn.Linear(channels, 6 * channels // share)
