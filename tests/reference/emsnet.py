"""EMSNet, written down equation by equation from the paper's mathematics, slowly and without the package's helpers.

Source: X.-T. Vo, "Efficient Vision Transformers with Multi-Scale and Partial Attentions for Object Recognition",
dissertation, University of Ulsan 2023, chapter 3; equation numbers are those of the chapter. Maps are (B, C, H, W).
Pooling, transposed convolution, resizing, unfolding and folding are spelled out by their rules, position by position
where that is clearest.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VARIANTS = {
    "XXTiny": {"channels": (32, 64, 128, 192), "depths": (2, 2, 4, 2)},
    "XTiny": {"channels": (32, 64, 96, 128), "depths": (3, 3, 10, 2)},
    "Tiny": {"channels": (64, 96, 128, 256), "depths": (3, 3, 10, 2)},
}


def conv1x1(inputs: int, outputs: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


def max_pool(x: Tensor, p: int) -> Tensor:
    """Patches of p x p pixels from the upper left corner on; the last ones are cut by the border."""
    H, W = x.shape[2:]
    rows = []
    for top in range(0, H, p):
        cells = [x[:, :, top : top + p, left : left + p].amax((2, 3)) for left in range(0, W, p)]
        rows.append(torch.stack(cells, dim=2))
    return torch.stack(rows, dim=2)


def adaptive_mean(x: Tensor, rows: int, columns: int) -> Tensor:
    """Bin i of n along a side of v pixels covers floor(i v / n) to ceil((i + 1) v / n), the end left out."""
    H, W = x.shape[2:]
    result = []
    for i in range(rows):
        top, bottom = math.floor(i * H / rows), math.ceil((i + 1) * H / rows)
        cells = []
        for j in range(columns):
            left, right = math.floor(j * W / columns), math.ceil((j + 1) * W / columns)
            cells.append(x[:, :, top:bottom, left:right].mean((2, 3)))
        result.append(torch.stack(cells, dim=2))
    return torch.stack(result, dim=2)


def interpolation(old: int, new: int) -> Tensor:
    """Matrix (new, old) of linear interpolation between pixel centres; beyond the outer centres the edge counts."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        position = max((i + 0.5) * old / new - 0.5, 0.0)
        below = min(math.floor(position), old - 1)
        share = position - below
        matrix[i, below] += 1 - share
        matrix[i, min(below + 1, old - 1)] += share
    return matrix


def resize_bilinear(x: Tensor, H: int, W: int) -> Tensor:
    down, across = (interpolation(old, new).to(x) for old, new in zip(x.shape[2:], (H, W), strict=True))
    return torch.einsum("yh,xw,bchw->bcyx", down, across, x)


class DepthwiseTransposed(nn.Module):
    """y[j, p r + a, p s + b] = sum over the m channels i of group j of x[i, r, s] weight[i, 0, a, b]."""

    def __init__(self, inputs: int, outputs: int, p: int):
        super().__init__()
        self.groups, self.p = outputs, p
        self.weight = nn.Parameter(torch.empty(inputs, 1, p, p))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (self.groups, -1))  # (B, c, m, H, W)
        weight = self.weight[:, 0].unflatten(0, (self.groups, -1))  # (c, m, p, p)
        y = torch.einsum("bcmrs,cmij->bcrisj", x, weight)
        return y.flatten(4, 5).flatten(2, 3)


class Prop(nn.Module):
    """Propagation: transposed convolution and batch norm."""

    def __init__(self, inputs: int, outputs: int, p: int):
        super().__init__()
        self.up, self.bn = DepthwiseTransposed(inputs, outputs, p), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.up(x))


class StaticBranch(nn.Module):
    """Prop_p(Coord(PE_p(x))), what lies past the border cut off (equations 3.2 and 3.3)."""

    def __init__(self, dim: int, p: int):
        super().__init__()
        self.p = p
        self.pe, self.pe_bn = conv1x1(dim, 2 * dim), nn.BatchNorm2d(2 * dim)
        self.row = nn.Conv2d(2 * dim, 2 * dim, (1, 11), padding=(0, 5), groups=2 * dim, bias=False)
        self.column = nn.Conv2d(2 * dim, 2 * dim, (11, 1), padding=(5, 0), groups=2 * dim, bias=False)
        self.coord_bn = nn.BatchNorm2d(2 * dim)
        self.prop = Prop(2 * dim, dim, p)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        y = self.pe_bn(self.pe(max_pool(x, self.p)))
        y = self.coord_bn(self.column(self.row(y)))
        return self.prop(y)[:, :, :H, :W]


class Static(nn.Module):
    """Static operator (equations 3.1 to 3.5)."""

    def __init__(self, dim: int, ratio: tuple[int, int, int]):
        super().__init__()
        self.parts = [dim * r // sum(ratio) for r in ratio]
        self.w1 = conv1x1(dim, dim)
        self.dw, self.dw_bn = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, bias=False), nn.BatchNorm2d(dim)
        self.p2, self.p4 = StaticBranch(self.parts[0], 2), StaticBranch(self.parts[2], 4)
        self.w2, self.w2_bn = conv1x1(dim, dim), nn.BatchNorm2d(dim)
        self.w3, self.w3_bn = conv1x1(dim, dim), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        w = whiten(self.w1(x))
        m1, m2, m3 = self.dw_bn(self.dw(w)).split(self.parts, dim=1)
        g = self.w2_bn(self.w2(torch.cat((self.p2(m1), m2, self.p4(m3)), dim=1)))
        return self.w3_bn(self.w3(x)) * torch.sigmoid(g)


def whiten(w: Tensor) -> Tensor:
    """Every pixel less its mean over the channels (equation 3.1)."""
    return w - sum(w[:, c : c + 1] for c in range(w.shape[1])) / w.shape[1]


class CMHSA(nn.Module):
    """Convolutional attention (equations 3.9 and 3.10): one 9 x 9 matrix per head at every other position."""

    def __init__(self, dim: int):
        super().__init__()
        self.heads = max(1, dim // 32)
        self.dw = nn.Conv2d(dim, dim, 3, stride=2, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.m = conv1x1(dim, self.heads * 81, bias=True)
        self.n = conv1x1(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        a = self.m(self.bn(self.dw(x)))
        v = self.n(x).unflatten(1, (self.heads, -1))  # (B, h, e/h, H, W)
        nothing = x.new_zeros(B, self.heads, C // self.heads)
        y = [[nothing for _ in range(W)] for _ in range(H)]
        for i in range(a.shape[2]):
            for j in range(a.shape[3]):
                # Taps of the window around row 2i, column 2j, row by row; outside of the map they are zero.
                taps = [(2 * i + r, 2 * j + s) for r in (-1, 0, 1) for s in (-1, 0, 1)]
                inside = [0 <= r < H and 0 <= s < W for r, s in taps]
                read = [v[:, :, :, r, s] if ok else nothing for (r, s), ok in zip(taps, inside, strict=True)]
                weights = a[:, :, i, j].unflatten(1, (self.heads, 9, 9)).softmax(-1)  # head, output tap, input tap
                for out, ((r, s), ok) in enumerate(zip(taps, inside, strict=True)):
                    if ok:
                        y[r][s] = y[r][s] + sum(weights[:, :, out, k, None] * read[k] for k in range(9))
        return torch.stack([torch.stack(row, dim=3) for row in y], dim=3).flatten(1, 2)


class GMHSA(nn.Module):
    """Attention between all tokens of the map (equation 3.7)."""

    def __init__(self, dim: int):
        super().__init__()
        self.heads = max(1, dim // 32)
        self.qkv, self.proj = conv1x1(dim, 3 * dim), conv1x1(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.flatten(2).unflatten(1, (self.heads, -1)) for t in self.qkv(x).chunk(3, dim=1))  # (B, h, d, N)
        weights = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(q.shape[2]), dim=-1)
        y = (weights @ v.transpose(2, 3)).transpose(2, 3)
        return self.proj(y.flatten(1, 2).unflatten(2, x.shape[2:]))


class DynamicBranch(nn.Module):
    """Prop_p(attention(PE_p(x))), resized where the patch does not divide the map (equations 3.6 and 3.7)."""

    def __init__(self, dim: int, p: int, attention: nn.Module):
        super().__init__()
        self.p = p
        self.pe, self.pe_bn = conv1x1(dim, dim), nn.BatchNorm2d(dim)
        self.attention = attention
        self.prop = Prop(dim, dim, p)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        grid = max(1, math.ceil(H / self.p)), max(1, math.ceil(W / self.p))
        y = self.prop(self.attention(self.pe_bn(self.pe(adaptive_mean(x, *grid)))))
        return y if y.shape[2:] == (H, W) else resize_bilinear(y, H, W)


class Dynamic(nn.Module):
    """Dynamic operator (equations 3.6 to 3.8)."""

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        self.c, self.g = DynamicBranch(half, 4, CMHSA(half)), DynamicBranch(half, 6, GMHSA(half))
        self.w4, self.w4_bn = conv1x1(dim, dim), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        return self.w4_bn(self.w4(torch.cat((self.c(x1), self.g(x2)), dim=1)))


class Block(nn.Module):
    """x + MSI(BN(x)), then x + MLP(BN(x))."""

    def __init__(self, dim: int, expand: int, ratio: tuple[int, int, int]):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)
        self.proj_in, self.proj_out = conv1x1(dim, dim), conv1x1(dim, dim)
        self.static, self.dynamic = Static(dim // 2, ratio), Dynamic(dim // 2)
        self.fuse, self.fuse_bn = conv1x1(dim, dim), nn.BatchNorm2d(dim)
        self.wide, self.narrow = conv1x1(dim, expand * dim), conv1x1(expand * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.proj_in(self.bn1(x)))
        s, d = y.chunk(2, dim=1)
        y = self.fuse_bn(self.fuse(torch.cat((self.static(s), self.dynamic(d)), dim=1)))
        x = x + self.proj_out(y)
        return x + self.narrow(F.gelu(self.wide(self.bn2(x))))


class EMSNet(nn.Module):
    """The classifier; `forward_features` gives the four maps of a backbone.

    Args:
        channels, depths: width of each stage, and its blocks.
        expand: hidden width of the perceptrons over the width of the stage.
        ratio: channels of the static operator in patches of 2, in none and in patches of 4.
    """

    def __init__(self, channels, depths, expand=(8, 8, 4, 4), ratio=(1, 2, 1), num_classes=1000):
        super().__init__()
        self.pe1 = nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False)
        self.pe1_bn = nn.BatchNorm2d(channels[0])
        self.pe1b = nn.Conv2d(channels[0], channels[0], 3, stride=2, padding=1, bias=False)
        self.pe1b_bn = nn.BatchNorm2d(channels[0])
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in pairwise(channels))
        self.down_bn = nn.ModuleList(nn.BatchNorm2d(c) for c in channels[1:])
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(c, r, ratio) for _ in range(n))
            for c, n, r in zip(channels, depths, expand, strict=True)
        )
        self.bn, self.classifier = nn.BatchNorm2d(channels[-1]), nn.Linear(channels[-1], num_classes)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        x = F.gelu(self.pe1_bn(self.pe1(images)))
        x = self.pe1b_bn(self.pe1b(x))
        maps = []
        for i, blocks in enumerate(self.stages):
            if i:
                x = self.down_bn[i - 1](self.down[i - 1](x))
            for block in blocks:
                x = block(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.bn(self.forward_features(images)[-1]).mean((2, 3)))
