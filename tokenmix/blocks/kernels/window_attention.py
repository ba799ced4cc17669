"""Attention inside non-overlapping windows of a channels-last map."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WindowAttention"]


class WindowAttention(nn.Module):
    """Softmax attention inside w x w windows, with a learned bias per head and offset between query and key.

    Args:
        heads: number of heads h; they split the channels evenly.
        window: side w of a window in tokens; it divides H and W.
        relative_bias: whether `bias_table`, ((2w - 1)**2, h), exists.

    Shape: q, k, v and the result are (B, H, W, C).

    Source: Swin Transformer (Liu et al. 2021), equation 4.
    """

    def __init__(self, heads: int, window: int, relative_bias: bool = True):
        super().__init__()
        self.heads = heads
        self.window = window
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads)) if relative_bias else None

    def bias(self) -> Tensor | None:
        """The table spread over pairs of positions, (1, h, w*w, w*w)."""
        if self.bias_table is None:
            return None
        w = self.window
        table = self.bias_table.view(2 * w - 1, 2 * w - 1, self.heads)
        # Row (qh - kh + w - 1), column (qw - kw + w - 1): sliding windows over the table, read backwards for keys.
        pairs = table.unfold(0, w, 1).unfold(1, w, 1).flip(-2, -1)  # (w, w, h, w, w)
        return pairs.permute(2, 0, 1, 3, 4).reshape(1, self.heads, w * w, w * w)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, W, C = q.shape
        h, w = self.heads, self.window

        def windows(x: Tensor) -> Tensor:  # (B, H, W, C) -> (B * H/w * W/w, h, w*w, d)
            x = x.reshape(B, H // w, w, W // w, w, h, C // h).permute(0, 1, 3, 5, 2, 4, 6)
            return x.reshape(-1, h, w * w, C // h)

        bias = self.bias()
        x = F.scaled_dot_product_attention(
            windows(q), windows(k), windows(v), attn_mask=bias if bias is None else bias.to(q.dtype)
        )
        x = x.reshape(B, H // w, W // w, h, w, w, C // h).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(B, H, W, C)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}, relative_bias={self.bias_table is not None}"
