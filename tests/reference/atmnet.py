"""ATMNet xT, T, S, B, L, the naive truth for tests: one obvious line per step of the dossier, no speed.

Source: architectures/atmnet.md. Section 1 gives `VARIANTS`, section 2 the forward pass, section 3 the ATM layer and
"Sampling, exactly", section 4 the attribute names, section 5 the initialisation. The paper is "Active Token Mixer"
(AAAI 2023). Where paper and released code differ the code is followed (section 7). The original samples in float32
under mixed precision; here everything stays in the dtype of the input.

Letters: B batch, C channels of a stage, S channels that share one offset, G = C/S offsets per direction, H W map,
N blocks of a stage. Maps are NCHW everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ATM", "VARIANTS", "ATMNet", "Block", "makes_offsets", "sample_axis", "sample_axis_loops"]

_SHARED: dict = {"channels": (64, 128, 320, 512), "channels_per_offset": (2, 4, 4, 8)}
VARIANTS: dict[str, dict] = {
    "xT": {**_SHARED, "blocks": (2, 2, 4, 2), "mlp_ratios": (4, 4, 4, 4), "offset_interval": 2, "drop_path": 0.1},
    "T": {**_SHARED, "blocks": (2, 3, 10, 3), "mlp_ratios": (4, 4, 4, 4), "offset_interval": 2, "drop_path": 0.1},
    "S": {**_SHARED, "blocks": (3, 4, 18, 3), "mlp_ratios": (8, 8, 4, 4), "offset_interval": 6, "drop_path": 0.2},
    "B": {**_SHARED, "blocks": (3, 8, 27, 3), "mlp_ratios": (8, 8, 4, 4), "offset_interval": 6, "drop_path": 0.3},
    "L": {
        "channels": (96, 192, 384, 768),
        "blocks": (3, 4, 24, 3),
        "mlp_ratios": (4, 4, 4, 4),
        "channels_per_offset": (2, 4, 4, 8),
        "offset_interval": 6,
        "drop_path": 0.3,
    },
}


def _per_token(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer that works on the last axis (Linear, LayerNorm) to the channels of a (B, C, H, W) map."""
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def sample_axis_loops(x: Tensor, offsets: Tensor, axis: int) -> Tensor:
    """Read every element of a map at its own index plus offset along one axis; one Python step per element.

    Args:
        x: map to read from, (B, C, H, W).
        offsets: pixels, any real number, (B, C, H, W).
        axis: 3 to move along W (horizontal), 2 to move along H (vertical).

    Returns:
        (B, C, H, W); y = (1-f) X[l] + f X[l+1] with p = index + offset, l = floor(p), f = p - l and X zero outside.
        Differentiable in both arguments; at an integer p the derivative by the offset is the right-hand one.

    Source: dossier section 3, "Sampling, exactly".
    """
    B, C, H, W = x.shape
    zero = x.new_zeros(())
    values = []
    for b in range(B):
        for c in range(C):
            for i in range(H):
                for j in range(W):
                    line, base = (x[b, c, :, j], i) if axis == 2 else (x[b, c, i, :], j)
                    p = base + offsets[b, c, i, j]
                    low = math.floor(p.item())
                    f = p - low
                    at_low = line[low] if 0 <= low < len(line) else zero
                    at_high = line[low + 1] if 0 <= low + 1 < len(line) else zero
                    values.append((1 - f) * at_low + f * at_high)
    return torch.stack(values).reshape(B, C, H, W)


def sample_axis(x: Tensor, offsets: Tensor, axis: int) -> Tensor:
    """`sample_axis_loops` with a gather in place of the loops; same arguments, result and derivatives."""
    n = x.shape[axis]
    base_shape = [1, 1, 1, 1]
    base_shape[axis] = n
    base = torch.arange(n, dtype=x.dtype, device=x.device).reshape(base_shape)
    p = base + offsets  # (B, C, H, W)
    low = torch.floor(p).detach()
    f = p - low
    low = low.long()
    return (1 - f) * _read_or_zero(x, low, axis) + f * _read_or_zero(x, low + 1, axis)


def _read_or_zero(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """x at `index` along `axis`, 0 where the index is outside; both (B, C, H, W)."""
    n = x.shape[axis]
    inside = (index >= 0) & (index < n)
    return torch.where(inside, torch.gather(x, axis, index.clamp(0, n - 1)), 0.0)


def makes_offsets(block: int, num_blocks: int, interval: int) -> bool:
    """Whether block `block` (0-based) of a stage computes new offsets: every K-th one, never the stage's last."""
    return block % interval == 0 and block != num_blocks - 1


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


class Mlp(nn.Module):
    """Linear, exact GELU, linear on the last axis."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Projection(nn.Module):
    """One convolution called `proj`: patch embedding, downsampling and position encoder are all this."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, padding: int, groups: int = 1) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, out, kernel, stride=stride, padding=padding, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ATM(nn.Module):
    """Active token mixer: a row-sampled, a column-sampled and an identity branch, weighed per image and channel."""

    def __init__(self, channels: int, channels_per_offset: int) -> None:
        super().__init__()
        self.channels_per_offset = channels_per_offset
        self.atm_c = nn.Linear(channels, channels, bias=False)
        self.atm_h = nn.Conv2d(channels, channels, 1)
        self.atm_w = nn.Conv2d(channels, channels, 1)
        self.fusion = Mlp(channels, channels // 4, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def sample(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """x read along W and along H, two of (B, C, H, W), from offsets (B, 2G, H, W): horizontal half first."""
        horizontal, vertical = offsets.chunk(2, dim=1)  # (B, G, H, W) each
        horizontal = horizontal.repeat_interleave(self.channels_per_offset, dim=1)  # (B, C, H, W)
        vertical = vertical.repeat_interleave(self.channels_per_offset, dim=1)  # (B, C, H, W)
        return sample_axis(x, horizontal, 3), sample_axis(x, vertical, 2)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        B, C, _, _ = x.shape
        x_w, x_h = self.sample(x, offsets)  # (B, C, H, W) each
        w = self.atm_w(x_w)  # (B, C, H, W)
        h = self.atm_h(x_h)  # (B, C, H, W)
        c = _per_token(self.atm_c, x)  # (B, C, H, W)
        summary = (w + h + c).mean(dim=(2, 3))  # (B, C)
        weights = torch.softmax(self.fusion(summary).reshape(B, C, 3), dim=2)  # (B, C, 3)
        weights = weights.reshape(B, C, 3, 1, 1)
        return _per_token(self.proj, weights[:, :, 0] * w + weights[:, :, 1] * h + weights[:, :, 2] * c)


class Block(nn.Module):
    """ATM and MLP with residuals; some blocks also make the offsets that the following ones reuse."""

    def __init__(
        self,
        channels: int,
        mlp_ratio: int,
        channels_per_offset: int,
        new_offsets: bool,
        next_channels: int | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.atm = ATM(channels, channels_per_offset)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, mlp_ratio * channels, channels)
        self.drop_path = DropPath(drop_path)
        self.offset_layer = None
        if new_offsets:
            num_offsets = 2 * channels // channels_per_offset
            self.offset_layer = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, num_offsets))
        # Held here for its name in the state dict; the model runs it, after the stage's output was taken.
        self.downsample = None if next_channels is None else Projection(channels, next_channels, 3, 2, 1)

    def forward(self, x: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) and the stage's latest offsets (B, 2G, H, W), None if this block makes the first ones."""
        if self.offset_layer is not None:
            offsets = _per_token(self.offset_layer, x)  # (B, 2G, H, W), from x before norm1
        x = x + self.drop_path(self.atm(_per_token(self.norm1, x), offsets))
        x = x + self.drop_path(_per_token(self.mlp, _per_token(self.norm2, x)))
        return x, offsets


class ATMNet(nn.Module):
    """ATMNet classifier, or with `dense=True` the four normed stage outputs and no head.

    Args:
        channels, blocks, mlp_ratios, channels_per_offset: C, N, E and S of the four stages.
        offset_interval: K; block j makes offsets when K divides j, unless it is the stage's last.
        drop_path: rate of the last block; the ramp starts at 0 in the first one.
        num_classes: outputs of `head`.
        dense: drop `norm` and `head`, add `norm_0` .. `norm_3`.

    Shape: images (B, 3, H, W); stage 1 has floor((H+1)/4) rows, each later one half of it rounded up.

    Raises:
        ValueError: if a stage has a single block, which could not get offsets from anywhere.
    """

    def __init__(
        self,
        channels: Sequence[int],
        blocks: Sequence[int],
        mlp_ratios: Sequence[int],
        channels_per_offset: Sequence[int],
        offset_interval: int,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        dense: bool = False,
    ) -> None:
        super().__init__()
        if min(blocks) < 2:
            raise ValueError(f"every stage needs at least 2 blocks, got {tuple(blocks)}: the last one makes no offsets")
        total = sum(blocks)
        rates = [drop_path * index / (total - 1) for index in range(total)]
        self.patch_embed = Projection(3, channels[0], 7, 4, 2)
        self.blocks = nn.ModuleList()
        self.pos_blocks = nn.ModuleList()
        first = 0
        for stage in range(4):
            C = channels[stage]
            stage_blocks = nn.ModuleList()
            for j in range(blocks[stage]):
                is_last = j == blocks[stage] - 1
                stage_blocks.append(
                    Block(
                        C,
                        mlp_ratios[stage],
                        channels_per_offset[stage],
                        new_offsets=makes_offsets(j, blocks[stage], offset_interval),
                        next_channels=channels[stage + 1] if is_last and stage < 3 else None,
                        drop_path=rates[first + j],
                    )
                )
            self.blocks.append(stage_blocks)
            self.pos_blocks.append(Projection(C, C, 3, 1, 1, groups=C))
            first += blocks[stage]
        self.dense = dense
        if dense:
            self.norm_0 = nn.LayerNorm(channels[0])
            self.norm_1 = nn.LayerNorm(channels[1])
            self.norm_2 = nn.LayerNorm(channels[2])
            self.norm_3 = nn.LayerNorm(channels[3])
        else:
            self.norm = nn.LayerNorm(channels[3])
            self.head = nn.Linear(channels[3], num_classes)
        _initialise(self)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Four maps (B, C_i, H_i, W_i), each after its blocks and before downsampling; normed if `dense`."""
        x = self.patch_embed(images)
        outputs = []
        for stage in range(4):
            offsets = None
            for block in self.blocks[stage]:
                if block.offset_layer is not None:
                    x = x + self.pos_blocks[stage](x)
                x, offsets = block(x, offsets)
            outputs.append(_per_token(getattr(self, f"norm_{stage}"), x) if self.dense else x)
            last = self.blocks[stage][-1]
            if last.downsample is not None:
                x = last.downsample(x)
        return outputs

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, num_classes); with `dense` the list of `forward_features`."""
        features = self.forward_features(images)
        if self.dense:
            return features
        x = _per_token(self.norm, features[3])  # (B, C4, H, W); the norm comes before the mean
        return self.head(x.mean(dim=(2, 3)))


def _initialise(model: ATMNet) -> None:
    """Section 5. Norm layers keep the PyTorch default, which is the one wanted: weight 1, bias 0.

    The truncation of the original cuts at +-2, which is 100 standard deviations: left out.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        if isinstance(module, nn.Linear) or name.endswith((".atm_h", ".atm_w")):
            nn.init.normal_(module.weight, std=0.02)
        else:
            fan_out = module.kernel_size[0] ** 2 * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
