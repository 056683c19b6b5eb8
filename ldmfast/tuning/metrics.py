"""How far pictures and trajectories are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ShapeError


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """(n,) float64 dB of pictures (n, 3, H, W) in [0, 1]: -10 log10 of the mean squared difference; infinite for equal
    ones. Raises ShapeError."""
    _check(images, reference)
    return -10 * torch.log10((images.double() - reference.double()).square().flatten(1).mean(1))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """(n,) float64 structural similarity of pictures (n, 3, H, W) in [0, 1]: the mean over channels and over windows
    that lie inside (Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity",
    equation 13: a Gaussian window of 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03). The window is 7 pixels in pictures
    that are narrower than 11. Raises ShapeError."""
    _check(images, reference)
    x, y = images.double(), reference.double()
    size = 11 if min(x.shape[-2:]) >= 11 else 7
    if min(x.shape[-2:]) < size:
        raise ShapeError(f"SSIM needs pictures of at least {size} pixels a side, got {tuple(x.shape[-2:])}")
    line = torch.exp(-(torch.arange(size, dtype=torch.float64, device=x.device) - size // 2).square() / (2 * 1.5**2))
    line = (line / line.sum()).expand(x.shape[1], 1, 1, size)

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, line, groups=len(line)), line.transpose(2, 3), groups=len(line))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    value = ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return value.flatten(1).mean(1)


class Trajectory:
    """Latents (steps, n, ...) after each step of a call, and levels (steps, 2): x = a picture + s noise there."""

    def __init__(self, latents: Sequence[Tensor], levels: np.ndarray) -> None:
        self.latents = torch.stack([x.double().cpu() for x in latents])
        a, s = np.asarray(levels, dtype=np.float64).T
        self.noise = s / (a + s)  # falls from 1 to 0
        shape = (-1, *[1] * (self.latents.ndim - 1))
        self.flow = self.latents / torch.as_tensor(a + s).reshape(shape)

    def at(self, noise: float) -> Tensor | None:
        """The state (n, ...) where the share of noise s / (a + s) is this, divided by a + s; None before the first
        step's end. Between steps it is a straight line: exactly the path of DDIM and Euler steps, because lines in
        x / a over s / a are lines in x / (a + s) over s / (a + s)."""
        if noise > self.noise[0] + 1e-9:
            return None
        i = int(np.searchsorted(-self.noise, -noise - 1e-9))  # the first level that is not above
        i = min(i, len(self.noise) - 1)
        if i == 0 or abs(self.noise[i] - noise) <= 1e-9:
            return self.flow[i]
        w = (self.noise[i - 1] - noise) / (self.noise[i - 1] - self.noise[i])
        return torch.lerp(self.flow[i - 1], self.flow[i], float(w))


def latent_errors(fast: Trajectory, reference: Trajectory) -> tuple[list[float], Tensor]:
    """Shares of noise at the ends of the fast call's steps, and (levels, n) relative errors |x - y| / |y| against the
    reference's state of the same level. Levels before the end of the reference's first step are left out. The last one
    is that of the finished latents."""
    levels, rows = [], []
    for noise, x in zip(fast.noise.tolist(), fast.flow):
        y = reference.at(noise)
        if y is not None:
            levels.append(noise)
            rows.append((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1))
    return levels, torch.stack(rows)


def _check(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise ShapeError(f"pictures are {tuple(images.shape)} and {tuple(reference.shape)}: both must be (n, C, H, W)")
