"""Attention inside non-overlapping windows of a channels-last map."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WindowAttention", "window_attention"]


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int, per_window: bool = False
) -> Tensor:
    """Softmax attention, scale d**-0.5, inside w x w windows of (B, H, W, C); heads share the channels.

    Args:
        bias: added to the scores, (1, h, w*w, w*w), or with `per_window` (H/w * W/w, h or 1, w*w, w*w).
    """
    B, H, W, C = q.shape
    h, w = heads, window
    if bias is not None:
        bias = bias.to(q.dtype)
        if per_window:
            bias = bias.expand(-1, h, -1, -1).reshape(1, -1, w * w, w * w)

    def windows(x: Tensor) -> Tensor:
        x = x.reshape(B, H // w, w, W // w, w, h, C // h).permute(0, 1, 3, 5, 2, 4, 6)
        # (B * n, h, w*w, d); with a bias of its own for every window (B, n * h, w*w, d)
        return x.reshape(*((B, -1) if per_window else (-1, h)), w * w, C // h)

    x = F.scaled_dot_product_attention(windows(q), windows(k), windows(v), attn_mask=bias)
    x = x.reshape(B, H // w, W // w, h, w, w, C // h).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(B, H, W, C)


class WindowAttention(nn.Module):
    """Softmax attention inside w x w windows, with a learned bias per head and offset between query and key.

    Args:
        heads: number of heads h; they split the channels evenly.
        window: side w of a window in tokens; it divides H and W.
        relative_bias: whether `bias_table`, ((2w - 1)**2, h), exists.
        shift: by how much the map was rolled up and left before; tokens that this brought together do not see each
            other. A side of one window is not rolled.

    Shape: q, k, v and the result are (B, H, W, C).

    Source: Swin Transformer (Liu et al. 2021), equation 4; section 3.2 for the shift.
    """

    def __init__(self, heads: int, window: int, relative_bias: bool = True, shift: int = 0):
        super().__init__()
        self.heads = heads
        self.window = window
        self.shift = shift
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads)) if relative_bias else None
        self.gathered: Tensor | None
        self.register_buffer("gathered", None, persistent=False)

    def prepare_for_inference(self) -> None:
        """Gather the bias once; the table is gone, so that no new one is loaded in vain."""
        self.register_buffer("gathered", self.bias())
        self.bias_table = None

    def bias(self) -> Tensor | None:
        """The table spread over pairs of positions, (1, h, w*w, w*w)."""
        if self.gathered is not None or self.bias_table is None:
            return self.gathered
        w = self.window
        table = self.bias_table.view(2 * w - 1, 2 * w - 1, self.heads)
        # Row (qh - kh + w - 1), column (qw - kw + w - 1): sliding windows over the table, read backwards for keys.
        pairs = table.unfold(0, w, 1).unfold(1, w, 1).flip(-2, -1)  # (w, w, h, w, w)
        return pairs.permute(2, 0, 1, 3, 4).reshape(1, self.heads, w * w, w * w)

    def mask(self, H: int, W: int, like: Tensor) -> Tensor:
        """-100 for every query and key of a window that come from opposite ends of the map, (n, 1, w*w, w*w)."""
        w = self.window
        # Behind the seam at H - shift (W - shift) stand the tokens that were rolled over.
        rows, columns = (
            (torch.arange(side, device=like.device) >= (side - self.shift if side > w else side)).to(like.dtype)
            for side in (H, W)
        )
        parts = (2 * rows[:, None] + columns).view(H // w, w, W // w, w).transpose(1, 2).reshape(-1, 1, w * w)
        return (parts[..., :, None] != parts[..., None, :]).to(like.dtype) * -100.0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        H, W = q.shape[1:3]
        bias = self.bias()
        if self.shift > 0 and max(H, W) > self.window:
            mask = self.mask(H, W, q)
            return window_attention(q, k, v, mask if bias is None else bias + mask, self.heads, self.window, True)
        return window_attention(q, k, v, bias, self.heads, self.window)

    def extra_repr(self) -> str:
        shift = f", shift={self.shift}" if self.shift else ""
        return f"heads={self.heads}, window={self.window}, relative_bias={self.bias_table is not None}{shift}"
