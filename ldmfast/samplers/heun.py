"""Heun's method in sigma space."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import LdmfastError
from .euler import input_scale, start_sigma
from .schedules import Schedule
from .spacing import sigma_grid, sigma_to_time
from .step_table import StepTable, TableBuilder


def heun(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
         sigmas: Sequence[float] | None = None, start: int = 0, s_churn: float = 0.0, s_tmin: float = 0.0,
         s_tmax: float = math.inf, s_noise: float = 1.0) -> StepTable:
    """Heun steps of dx/dsigma = (x - x0) / sigma, Karras et al. 2022, algorithm 1; diffusers'
    HeunDiscreteScheduler. Order 2, two evaluations a step; the last, to sigma 0, is an Euler step of one.

    ``s_churn`` > 0 is the stochastic sampler (there algorithm 2): while s_tmin <= sigma <= s_tmax a step starts from
    sigma (1 + gamma), gamma = min(s_churn / steps, sqrt(2) - 1), to which the state is noised, with deviation
    ``s_noise``, and which the network is told. The noise is part of the step before, or of the start.

    Registers: r0 the state at the step's start, r1 the slope there.
    """
    if s_churn < 0:
        raise LdmfastError(f"heun: s_churn={s_churn}, must not be negative")
    grid = sigma_grid(schedule, steps, timesteps, sigmas)
    n = len(grid.times)
    low, high = grid.sigmas[:-1], grid.sigmas[:-1].copy()
    high[(low >= s_tmin) & (low <= s_tmax)] *= 1 + min(s_churn / n, math.sqrt(2) - 1)
    raised = s_noise * np.sqrt(high**2 - low**2)
    times = np.where(high > low, sigma_to_time(high, schedule), grid.times)
    b = TableBuilder("heun", schedule, registers=2, clips=schedule.clip_sample)
    for i in range(start, n):
        sigma, sigma_next = high[i], grid.sigmas[i + 1]
        dt = sigma_next - sigma
        slope = (b.x - b.predict(1.0, sigma)[0]) / sigma
        if sigma_next == 0:
            b.stage(times[i], b.x + dt * slope, c_in=input_scale(sigma))
            continue
        b.stage(times[i], b.x + dt * slope, {0: b.x, 1: slope}, c_in=input_scale(sigma), end=False)
        slope_next = (b.x - b.predict(1.0, sigma_next)[0]) / sigma_next
        row = b.r[0] + dt / 2 * (b.r[1] + slope_next)
        if i + 1 < n and raised[i + 1] > 0:
            row = row + raised[i + 1] * b.noise
        b.stage(grid.times[min(i + 1, n - 1)], row, c_in=input_scale(sigma_next))
    first = raised[start] if start < n else 0.0
    return b.table(grid.times[start:], [(1.0, float(s)) for s in high[start:]],
                   math.hypot(start_sigma(schedule, grid), first), start)
