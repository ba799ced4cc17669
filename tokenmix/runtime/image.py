"""Pictures as inputs: a file of the user's, or the photograph that comes with tokenmix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PHOTOGRAPH", "PictureError", "load_picture"]

PHOTOGRAPH = Path(__file__).parent / "photograph.jpg"

# Mean and standard deviation of ImageNet's training images, per channel, of values in 0..1.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PictureError(ValueError):
    """The file is not a picture that can be read."""


def load_picture(path: Path | None, shape: tuple[int, int, int]) -> tuple[Tensor, str]:
    """A picture resized to (channels, height, width) and normalised, as a batch of one, and what to call it.

    Other channel counts than 3 repeat or cut the picture's own.
    """
    import numpy
    import torch
    from PIL import Image, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(path or PHOTOGRAPH) as picture:
            small = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path} is not a picture that can be read: {error}") from None
    values = torch.from_numpy(numpy.array(small)).permute(2, 0, 1).float() / 255
    values = (values - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
    repeats = -(-channels // 3)
    return values.repeat(repeats, 1, 1)[:channels].unsqueeze(0), str(path) if path else "the photograph"
