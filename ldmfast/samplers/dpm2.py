"""DPM2: second-order midpoint steps in sigma space, and the ancestral form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import LdmfastError
from .euler import ancestral_split, input_scale, sigma_levels, start_sigma
from .schedules import Schedule
from .spacing import sigma_grid, sigma_to_time
from .step_table import StepTable, TableBuilder


def dpm2(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
         sigmas: Sequence[float] | None = None, start: int = 0) -> StepTable:
    """Midpoint steps of dx/dsigma = (x - x0) / sigma with the middle at the geometric mean of the sigmas:
    DPM- Solver-2 of Lu et al. 2022, algorithm 1, in sigma space (as Karras et al. 2022, appendix B.2,
    restate it); diffusers' KDPM2DiscreteScheduler. Order 2, two evaluations a step, one in the last.

    Register r0: the state at the step's start.
    """
    return _midpoint("dpm2", schedule, steps, timesteps, sigmas, start, 0.0)


def dpm2_a(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
           sigmas: Sequence[float] | None = None, start: int = 0, eta: float = 1.0) -> StepTable:
    """DPM2 to sigma_down, then noise of sigma_up, split as in ancestral Euler; diffusers'
    KDPM2AncestralDiscreteScheduler. ``eta`` scales sigma_up; 0 is DPM2."""
    if not 0 <= eta <= 1:
        raise LdmfastError(f"dpm2_a: eta={eta}, must be in [0, 1]")
    return _midpoint("dpm2_a", schedule, steps, timesteps, sigmas, start, eta)


def _midpoint(name: str, schedule: Schedule, steps: int | None, timesteps: Sequence[float] | None,
              sigmas: Sequence[float] | None, start: int, eta: float) -> StepTable:
    if schedule.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise LdmfastError(f"{name}: prediction_type={schedule.prediction_type!r} is not supported")
    grid = sigma_grid(schedule, steps, timesteps, sigmas, round_karras=True)
    b = TableBuilder(name, schedule, registers=1)
    for i in range(start, len(grid.times)):
        sigma, sigma_next = grid.sigmas[i], grid.sigmas[i + 1]
        slope = (b.x - b.predict(1.0, sigma)[0]) / sigma
        if sigma_next == 0:
            b.stage(grid.times[i], b.x - sigma * slope, c_in=input_scale(sigma))
            continue
        down, up = ancestral_split(sigma, sigma_next, eta)
        if down == 0:
            raise LdmfastError(f"{name}: sigma_down is 0 at step {i}; use fewer steps or a smaller eta")
        middle = math.sqrt(sigma * down)
        b.stage(grid.times[i], b.x + (middle - sigma) * slope, {0: b.x}, c_in=input_scale(sigma), end=False)
        slope = (b.x - b.predict(1.0, middle)[0]) / middle
        time = float(sigma_to_time(np.array([middle]), schedule)[0])
        b.stage(time, b.r[0] + (down - sigma) * slope + up * b.noise, c_in=input_scale(middle))
    return b.table(grid.times[start:], sigma_levels(grid, start), start_sigma(schedule, grid), start)
