"""DDPM: the ancestral sampler of the training chain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import LdmfastError
from .schedules import Schedule
from .spacing import Grid, training_grid
from .step_table import StepTable, TableBuilder

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")


def ddpm(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
         sigmas: Sequence[float] | None = None, start: int = 0,
         variance_type: str = "fixed_small") -> StepTable:
    """Denoising diffusion probabilistic models, Ho et al. 2020, eq. 6, 7 and algorithm 2; diffusers'
    DDPMScheduler. Fresh noise every step but the last.

    x' = mean of q(x' | x, x0) + s noise, s^2 the posterior variance ("fixed_small") or the step's own beta
    ("fixed_large"). Skipped timesteps make one longer step of the chain. Learned variances are not linear in
    the network output and are refused.
    """
    grid = training_grid(schedule, steps, timesteps, sigmas, next_in_list=True, final_alpha=1.0)
    return ddpm_on(schedule, grid, start, variance_type)


def ddpm_on(schedule: Schedule, grid: Grid, start: int = 0, variance_type: str = "fixed_small",
            ratio_type: type[np.floating] = np.float64) -> StepTable:
    """``ddpm`` on a finished grid. ``ratio_type`` is the precision of abar / abar': beta = 1 - abar / abar' of a
    single training step is 1e-4, of which float32 (diffusers) loses up to 3e-4."""
    if variance_type not in VARIANCES:
        raise LdmfastError(f"ddpm: variance_type={variance_type!r} is not supported; use one of "
                           f"{', '.join(VARIANCES)}")
    b = TableBuilder("ddpm", schedule, clips=True)
    for i in range(start, len(grid.times)):
        a, a_prev = grid.alphas[i], grid.prev_alphas[i]
        x0, _ = b.predict(a**0.5, (1 - a) ** 0.5)
        alpha = float(ratio_type(a / a_prev))
        beta = 1 - alpha
        row = a_prev**0.5 * beta / (1 - a) * x0 + alpha**0.5 * (1 - a_prev) / (1 - a) * b.x
        variance = beta if variance_type == "fixed_large" else (1 - a_prev) / (1 - a) * beta
        if grid.times[i] > 0:
            row = row + variance**0.5 * b.noise
        b.stage(grid.times[i], row)
    levels = [(a**0.5, (1 - a) ** 0.5) for a in grid.alphas[start:]]
    return b.table(grid.times[start:], levels, 1.0, start)
