"""Sampling a channels-last map at fractional distances along one axis."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["axial_sample"]


def axial_sample(x: Tensor, offsets: Tensor, axis: str) -> Tensor:
    """Linear interpolation of the zero-extended map at position + offset, every channel group at its own offset.

    Args:
        x: (B, H, W, C).
        offsets: (B, H, W, G) in pixels, G a divisor of C; number g serves channels g*C/G .. (g+1)*C/G - 1.
        axis: "height" or "width".

    Returns:
        (B, H, W, C) in the dtype of x. Positions and weights are computed in float32 at least. The slope at an
        integer position is the right-hand one.

    Source: Active Token Mixer (Wei et al. 2023), section 3.2.
    """
    dim = 1 if axis == "height" else 2
    B, H, W, C = x.shape
    G = offsets.shape[-1]
    n = x.shape[dim]
    exact = torch.promote_types(offsets.dtype, torch.float32)
    base = torch.arange(n, device=x.device, dtype=exact)
    position = offsets.to(exact) + (base.view(n, 1, 1) if dim == 1 else base.view(n, 1))
    left = position.floor()
    fraction = (position - left).unsqueeze(-1)  # (B, H, W, G, 1)
    # One zero in front and one behind stand for everything outside. The second clamp catches NaN offsets.
    left = left.clamp(-2, n).long().clamp(-2, n)
    padding = (0, 0, 0, 0, 1, 1) if dim == 1 else (0, 0, 1, 1)
    padded = F.pad(x, padding).unflatten(-1, (G, C // G))

    def read(index: Tensor) -> Tensor:
        return padded.gather(dim, (index.clamp(-1, n) + 1).unsqueeze(-1).expand(B, H, W, G, C // G))

    near, far = read(left), read(left + 1)
    return (near + (far - near) * fraction).to(x.dtype).flatten(-2)
