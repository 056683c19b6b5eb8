"""Smoothed energy guidance: away from what the network predicts when its queries are blurred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..errors import LdmfastError
from .guide import COND, Branch, Call, Guidance, Terms
from .perturb import Perturb, check_layers, grid
from .scaled import check_number, check_range


@dataclass(frozen=True)
class Blurred(Perturb):
    """The picture's queries are blurred over its grid."""

    sigma: float = math.inf
    guidance: ClassVar[str] = "SEG"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, text: int, size: tuple[int, int]) -> Tensor:
        first = q.shape[1] - (k.shape[1] - text)  # queries of the text
        n, tokens, heads, dim = q[:, first:].shape
        h, w = grid(tokens, size)
        image = q[:, first:].reshape(n, h, w, heads * dim).permute(0, 3, 1, 2)
        blurred = blur(image, self.sigma, math.ceil(6 * self.sigma) // 2 * 2 + 1 if self.sigma < math.inf else 0)
        rows = blurred.permute(0, 2, 3, 1).reshape(n, tokens, heads, dim)
        return ops.attention(torch.cat([q[:, :first], rows], dim=1) if first else rows, k, v, bias=bias)


def blur(image: Tensor, sigma: float, width: int) -> Tensor:
    """(N, C, H, W) with a Gaussian of ``sigma`` pixels, cut to ``width`` of them and to the picture's smaller side, and
    the borders reflected; sigma infinite is the mean, 0 nothing."""
    if sigma == 0:
        return image
    if sigma == math.inf:
        return image.mean(dim=(2, 3), keepdim=True).expand_as(image)
    side = min(image.shape[2:])
    half = min(width, side - (side % 2 - 1)) // 2
    half = min(half, side - 1)  # what reflection reaches
    at = torch.arange(-half, half + 1, dtype=torch.float32, device=image.device)
    kernel = torch.softmax(-0.5 * (at / sigma).square(), 0).to(image.dtype)
    channels = image.shape[1]
    padded = F.pad(image, (half, half, half, half), mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


@dataclass(frozen=True, kw_only=True)
class SEG(Guidance):
    """Adds scale * (cond - smoothed): in the self-attention of ``layers`` the queries are blurred with a Gaussian of
    ``sigma`` tokens, infinite: replaced by their mean (Hong 2024, "Smoothed Energy Guidance: Guiding Diffusion Models
    with Reduced Energy Curvature of Attention", section 4). One branch more in the batch."""

    scale: float = 3.0
    layers: str | Sequence[str] = ("mid",)
    sigma: float = math.inf
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_number("scale", self.scale)
        if isinstance(self.sigma, bool) or not isinstance(self.sigma, (int, float)) or not self.sigma > 0:
            raise LdmfastError(f"sigma={self.sigma!r} is not a positive number of tokens, or infinite")
        check_range(self.start, self.stop)

    def terms(self, call: Call) -> Terms:
        on = float(self.scale) * call.within(self.start, self.stop)
        return {Branch("smoothed", perturb=Blurred(tuple(self.layers), float(self.sigma))): -on, COND: on}
