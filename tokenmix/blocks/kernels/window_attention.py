"""Attention inside non-overlapping windows of a channels-last map."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WindowAttention", "abstract_window_attention", "window_attention"]


def split_windows(x: Tensor, heads: int, window: int) -> Tensor:
    """(B, H, W, C) to windows row by row, (B, n, h, w*w, d); heads share the channels."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // window, window, W // window, window, heads, C // heads).permute(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(B, (H // window) * (W // window), heads, window * window, C // heads)


def join_windows(x: Tensor, height: int, width: int, window: int) -> Tensor:
    """Windows (B, n, h, w*w, d) back in their places on (B, height, width, C)."""
    B, _, h, _, d = x.shape
    x = x.reshape(B, height // window, width // window, h, window, window, d).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(B, height, width, h * d)


def seam_mask(height: int, width: int, window: int, shift: int, like: Tensor) -> Tensor:
    """-100 for every query and key of a window that come from opposite ends of a rolled map, (n, 1, w*w, w*w)."""
    w = window
    # Behind the seam at H - shift (W - shift) stand the tokens that were rolled over.
    rows, columns = (
        (torch.arange(side, device=like.device) >= (side - shift if side > w else side)).to(like.dtype)
        for side in (height, width)
    )
    parts = (2 * rows[:, None] + columns).view(height // w, w, width // w, w).transpose(1, 2).reshape(-1, 1, w * w)
    return (parts[..., :, None] != parts[..., None, :]).to(like.dtype) * -100.0


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, window: int, shift: int = 0
) -> Tensor:
    """Softmax attention, scale d**-0.5, inside w x w windows of (B, H, W, C); heads share the channels.

    Args:
        bias: added to the scores, (1, h, w*w, w*w).
        shift: as for `WindowAttention`.
    """
    (_, H, W, _), h, w = q.shape, heads, window
    q, k, v = (split_windows(x, h, w) for x in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype)
    if shift > 0 and max(H, W) > w:
        mask = seam_mask(H, W, w, shift, q)
        mask = (mask if bias is None else bias + mask).expand(-1, h, -1, -1).reshape(1, -1, w * w, w * w)
        x = F.scaled_dot_product_attention(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), attn_mask=mask)
    else:
        x = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=bias)
    return join_windows(x.reshape(q.shape), H, W, w)


def abstract_window_attention(
    q: Tensor, k: Tensor, v: Tensor, abstract: Tensor, heads: int, window: int
) -> tuple[Tensor, Tensor]:
    """`window_attention` where one token more asks in every window; it is no key and no value.

    Args:
        abstract: the query of that token, (C,).

    Returns:
        The attended map, (B, H, W, C), and what the token gathered in every window, row by row, (B, n, C).
    """
    (B, H, W, _), h, w = q.shape, heads, window
    q, k, v = (split_windows(x, h, w) for x in (q, k, v))
    q = torch.cat([q, abstract.to(q.dtype).view(h, 1, -1).expand(B, q.shape[1], -1, -1, -1)], dim=3)
    x = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view(q.shape)
    return join_windows(x[..., :-1, :], H, W, w), x[..., -1, :].flatten(2)


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

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, self.bias(), self.heads, self.window, self.shift)

    def extra_repr(self) -> str:
        shift = f", shift={self.shift}" if self.shift else ""
        return f"heads={self.heads}, window={self.window}, relative_bias={self.bias_table is not None}{shift}"
