"""Sampling a channels-last map at positions beside a regular grid."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["bilinear_sample"]


def bilinear_sample(x: Tensor, dx: Tensor, dy: Tensor, outside: str) -> Tensor:
    """Bilinear interpolation of x at the centres of an h x w grid of cells, moved by dx and dy cells.

    Args:
        x: (B, H, W, C).
        dx, dy: (B, h, w, G) in cells of the grid, to the right and down, G a divisor of C; number g serves channels
            g*C/G .. (g+1)*C/G - 1.
        outside: what lies beyond the outermost pixel centres: "zeros", or the nearest pixel with "border".

    Returns:
        (B, h, w, C) in the dtype of x. Positions and weights are computed in float32 at least. Where a position meets
        a pixel centre the slope is that of either side.
    """
    h, w, G = dx.shape[1:]
    exact = torch.promote_types(torch.promote_types(x.dtype, dx.dtype), torch.float32)
    columns = torch.arange(w, device=x.device, dtype=exact).view(w, 1) + 0.5
    rows = torch.arange(h, device=x.device, dtype=exact).view(h, 1, 1) + 0.5
    # Torch's grid has the outer edges of the map at -1 and 1.
    grid = torch.stack(((dx.to(exact) + columns) / w, (dy.to(exact) + rows) / h), dim=-1) * 2 - 1
    y = F.grid_sample(
        x.to(exact).permute(0, 3, 1, 2).unflatten(1, (G, -1)).flatten(0, 1),
        grid.permute(0, 3, 1, 2, 4).flatten(0, 1),
        padding_mode=outside,
        align_corners=False,
    )
    return y.unflatten(0, (-1, G)).flatten(1, 2).permute(0, 2, 3, 1).to(x.dtype).contiguous()
