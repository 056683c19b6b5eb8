"""Heun's method in sigma space."""

from __future__ import annotations

from collections.abc import Sequence

from .euler import input_scale, sigma_levels, start_sigma
from .schedules import Schedule
from .spacing import sigma_grid
from .step_table import StepTable, TableBuilder


def heun(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
         sigmas: Sequence[float] | None = None, start: int = 0) -> StepTable:
    """Heun steps of dx/dsigma = (x - x0) / sigma, Karras et al. 2022, algorithm 1; diffusers'
    HeunDiscreteScheduler. Order 2, two evaluations a step; the last, to sigma 0, is an Euler step of one.

    Registers: r0 the state at the step's start, r1 the slope there.
    """
    grid = sigma_grid(schedule, steps, timesteps, sigmas)
    b = TableBuilder("heun", schedule, registers=2, clips=schedule.clip_sample)
    for i in range(start, len(grid.times)):
        sigma, sigma_next = grid.sigmas[i], grid.sigmas[i + 1]
        dt = sigma_next - sigma
        slope = (b.x - b.predict(1.0, sigma)[0]) / sigma
        if sigma_next == 0:
            b.stage(grid.times[i], b.x + dt * slope, c_in=input_scale(sigma))
            continue
        b.stage(grid.times[i], b.x + dt * slope, {0: b.x, 1: slope}, c_in=input_scale(sigma), end=False)
        slope_next = (b.x - b.predict(1.0, sigma_next)[0]) / sigma_next
        time = grid.times[min(i + 1, len(grid.times) - 1)]
        b.stage(time, b.r[0] + dt / 2 * (b.r[1] + slope_next), c_in=input_scale(sigma_next))
    return b.table(grid.times[start:], sigma_levels(grid, start), start_sigma(schedule, grid), start)
