"""The picture sizes that PixArt was trained at: a call takes the one nearest in aspect ratio and fits the picture to
the size that was asked for (Chen et al. 2023, section 3.2; diffusers' use_resolution_binning)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# heights and widths in units, of about as many pixels as 32 by 32
_SIZES = ((16, 64), (16, 58), (18, 56), (18, 54), (18, 52), (20, 50), (20, 48), (22, 46), (22, 44), (22, 42), (24, 42),
          (24, 40), (26, 38), (26, 36), (28, 36), (28, 34), (30, 34), (30, 32), (32, 32), (32, 30), (34, 30), (34, 28),
          (36, 28), (36, 26), (38, 26), (40, 24), (42, 24), (44, 22), (46, 22), (48, 20), (50, 20), (54, 18), (64, 16))
_ONLY_2048 = ((16, 62), (16, 60), (52, 18), (56, 18), (58, 16), (60, 16), (62, 16))


def trained_size(config: Any, height: int, width: int) -> tuple[int, int]:
    """The training size whose aspect ratio, to two digits, is nearest to height / width; the size itself for a network
    that was not trained at several."""
    if config.sample_size not in (32, 64, 128, 256):
        return height, width
    unit = config.sample_size // 4  # pixels
    sizes = sorted(_SIZES + (_ONLY_2048 if config.sample_size == 256 else ()), key=lambda s: s[0] / s[1])
    high, wide = min(sizes, key=lambda s: abs(round(s[0] / s[1], 2) - height / width))
    return high * unit, wide * unit


def fit(pixels: Tensor, height: int, width: int) -> Tensor:
    """(N, C, H, W) -> (N, C, height, width): scaled until it covers the size, the middle cut out."""
    h, w = pixels.shape[2:]
    if (h, w) == (height, width):
        return pixels
    ratio = max(height / h, width / w)
    scaled = (int(h * ratio), int(w * ratio))
    pixels = torch.nn.functional.interpolate(pixels, size=scaled, mode="bilinear", align_corners=False)
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return pixels[:, :, top:top + height, left:left + width]
