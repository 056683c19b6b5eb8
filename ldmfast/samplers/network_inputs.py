"""What a network is shown beside the state: times that are shared near the end, and a latent drawn at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import LdmfastError
from .sample import Denoiser, Generators, noise_source


def time_buckets(limit: float, count: int) -> Callable[[float], float]:
    """Times below ``limit`` told as the lower end of the one of ``count`` equal intervals that they lie in, others as
    they are: E-TSDM (Yang et al. 2024, equation 5), for networks trained so. For ``make_table(network_times=...)``;
    the solver keeps its own times. Raises LdmfastError."""
    if not (math.isfinite(limit) and limit > 0 and isinstance(count, int) and count >= 1):
        raise LdmfastError(f"time_buckets: limit={limit} must be above 0, and count={count} a whole number of at "
                           "least 1")
    width = limit / count

    def told(t: float) -> float:
        return t if t >= limit else math.floor(t / width) * width

    return told


def soft_mixture(denoise: Callable[[Tensor, float, int, Tensor], Tensor | Sequence[Tensor | None]], size: int,
                 generator: Generators = None) -> Denoiser:
    """A denoiser that draws a latent eta ~ N(0, 1), (pictures, size), for each evaluation of ``denoise(x, t, stage,
    eta)``: soft mixture denoising (Li et al. 2024). One step of the chain may then have several modes where a Gaussian
    has one, and few steps do. Use it with ancestral steps (ddpm, or ddim with eta 1). generator: as for ``sample``, and
    another one than the steps' noise is drawn from. Raises LdmfastError."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise LdmfastError(f"soft_mixture: size={size!r}, must be a whole number of at least 1")

    def mixed(x: Tensor, t: float, stage: int) -> Tensor | Sequence[Tensor | None]:
        like = torch.empty((x.shape[0], size), dtype=x.dtype, device=x.device)
        return denoise(x, t, stage, noise_source(generator, like)(stage, like))

    return mixed
