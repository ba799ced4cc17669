"""Outlook attention: the weights of a window are read off the position it stands around."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["outlook_attention"]


def outlook_attention(logits: Tensor, v: Tensor, heads: int, kernel: int, stride: int) -> Tensor:
    """Values mixed inside of zero-padded k x k windows; windows add up where they overlap.

    Args:
        logits: (B, ceil(H / stride), ceil(W / stride), heads * k**4): per window, head and place in it one row of
            k**2, which softmax turns into weights.
        v: (B, H, W, C); heads share the channels.

    Returns:
        (B, H, W, C)

    Source: VOLO (Yuan et al. 2021), section 3.1.
    """
    size = kernel * kernel
    weights = F.softmax(logits.unflatten(-1, (heads, size, size)), dim=-1)  # (B, h, w, heads, k*k, k*k)
    x = F.pad(v, (0, 0, *4 * (kernel // 2,)))
    x = x.unfold(1, kernel, stride).unfold(2, kernel, stride).flatten(-2)  # (B, h, w, C, k*k)
    x = weights @ x.unflatten(3, (heads, -1)).transpose(-2, -1)  # (B, h, w, heads, k*k, d)
    x = x.permute(0, 3, 5, 4, 1, 2).flatten(1, 3).flatten(2)  # (B, C * k*k, h * w)
    return F.fold(x, v.shape[1:3], kernel, padding=kernel // 2, stride=stride).permute(0, 2, 3, 1).contiguous()
