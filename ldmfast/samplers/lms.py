"""Linear multistep (Adams-Bashforth) in sigma space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import LdmfastError
from .euler import input_scale, sigma_levels, start_sigma
from .schedules import Array, Schedule
from .spacing import sigma_grid
from .step_table import StepTable, TableBuilder


def lms(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None, start: int = 0, order: int = 4) -> StepTable:
    """Adams-Bashforth with variable steps for dx/dsigma = (x - x0) / sigma: the slope is the polynomial
    through the last ``order`` slopes, integrated exactly over the step (Hairer et al. 1993, section III.5);
    diffusers' LMSDiscreteScheduler. Starts at order 1 and grows.
    """
    if not 1 <= order <= 8:
        raise LdmfastError(f"lms: order={order}, must be in 1..8")
    grid = sigma_grid(schedule, steps, timesteps, sigmas)
    b = TableBuilder("lms", schedule, registers=max(order - 1, 1))
    for i in range(start, len(grid.times)):
        sigma = grid.sigmas[i]
        slopes = [(b.x - b.predict(1.0, sigma)[0]) / sigma, *b.r]
        known = min(order, i - start + 1)
        weights = _adams_bashforth(grid.sigmas[i - known + 1:i + 1][::-1], sigma, grid.sigmas[i + 1])
        row = b.x + sum(w * d for w, d in zip(weights, slopes))
        b.stage(grid.times[i], row, dict(enumerate(slopes[:len(b.r)])), c_in=input_scale(sigma))
    return b.table(grid.times[start:], sigma_levels(grid, start), start_sigma(schedule, grid), start)


def _adams_bashforth(nodes: Array, low: float, high: float) -> Array:
    """Integrals over [low, high] of the Lagrange polynomials on the nodes; Gauss-Legendre is exact for
    them."""
    points, weights = np.polynomial.legendre.leggauss(len(nodes) // 2 + 1)
    t = (high - low) / 2 * points + (high + low) / 2
    result = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        lagrange = np.prod((t[:, None] - others) / (node - others), axis=1)
        result.append((high - low) / 2 * float(weights @ lagrange))
    return np.array(result)
