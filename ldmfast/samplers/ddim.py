"""DDIM."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import LdmfastError
from .schedules import Schedule
from .spacing import Grid, training_grid
from .step_table import StepTable, TableBuilder


def ddim(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
         sigmas: Sequence[float] | None = None, start: int = 0, eta: float = 0.0,
         use_clipped_model_output: bool = False) -> StepTable:
    """Denoising diffusion implicit models, Song et al. 2021, eq. 12 and 16; diffusers' DDIMScheduler.

    x' = sqrt(abar') x0 + sqrt(1 - abar' - s^2) eps + s noise with s = eta times the DDPM posterior's
    deviation: eta 0 is deterministic, of order 1 in the step; eta 1 is ancestral.
    ``use_clipped_model_output`` recomputes eps from the clipped x0. Raises LdmfastError for eta outside [0,
    1] and for steps or lists that do not fit.
    """
    grid = training_grid(schedule, steps, timesteps, sigmas, next_in_list=False,
                         final_alpha=schedule.final_alpha_cumprod)
    return ddim_on(schedule, grid, start, eta, use_clipped_model_output)


def ddim_on(schedule: Schedule, grid: Grid, start: int = 0, eta: float = 0.0,
            use_clipped_model_output: bool = False) -> StepTable:
    """``ddim`` on a finished grid."""
    if not 0 <= eta <= 1:
        raise LdmfastError(f"ddim: eta={eta}, must be in [0, 1]")
    b = TableBuilder("ddim", schedule, clips=True)
    for i in range(start, len(grid.times)):
        a, a_prev = grid.alphas[i], grid.prev_alphas[i]
        x0, eps = b.predict(a**0.5, (1 - a) ** 0.5)
        if use_clipped_model_output:
            eps = (b.x - a**0.5 * x0) / (1 - a) ** 0.5
        s = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
        b.stage(grid.times[i], a_prev**0.5 * x0 + (1 - a_prev - s**2) ** 0.5 * eps + s * b.noise)
    levels = [(a**0.5, (1 - a) ** 0.5) for a in grid.alphas[start:]]
    return b.table(grid.times[start:], levels, 1.0, start)
