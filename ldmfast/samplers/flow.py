"""Rectified flow: Euler and Heun along x = (1 - sigma) x0 + sigma noise."""

from __future__ import annotations

from collections.abc import Sequence

from .schedules import Schedule
from .spacing import Grid, flow_grid
from .step_table import StepTable, TableBuilder


def flow_euler(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
               sigmas: Sequence[float] | None = None, start: int = 0,
               stochastic_sampling: bool = False) -> StepTable:
    """Euler steps of dx/dsigma = v, Liu et al. 2022 (rectified flow), eq. 1, with the time shift of Esser et
    al. 2024, eq. 23; diffusers' FlowMatchEulerDiscreteScheduler. ``stochastic_sampling`` predicts x0 and
    noises it anew each step."""
    grid = flow_grid(schedule, steps, timesteps, sigmas, kind="match")
    b = TableBuilder("flow_euler", schedule)
    for i in range(start, len(grid.times)):
        sigma, sigma_next = grid.sigmas[i], grid.sigmas[i + 1]
        if stochastic_sampling:
            row = (1 - sigma_next) * (b.x - sigma * b.e) + sigma_next * b.noise
        else:
            row = b.x + (sigma_next - sigma) * b.e
        b.stage(grid.times[i], row)
    return b.table(grid.times[start:], _levels(grid, start), 1.0, start)


def flow_heun(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
              sigmas: Sequence[float] | None = None, start: int = 0) -> StepTable:
    """Heun steps of dx/dsigma = v (Karras et al. 2022, algorithm 1, for a flow); diffusers'
    FlowMatchHeunDiscreteScheduler. Order 2, two evaluations a step, one in the last.

    Registers: r0 the state at the step's start, r1 the velocity there.
    """
    grid = flow_grid(schedule, steps, timesteps, sigmas, kind="match")
    b = TableBuilder("flow_heun", schedule, registers=2)
    n = len(grid.times)
    for i in range(start, n):
        dt = grid.sigmas[i + 1] - grid.sigmas[i]
        if i == n - 1:
            b.stage(grid.times[i], b.x + dt * b.e)
            continue
        b.stage(grid.times[i], b.x + dt * b.e, {0: b.x, 1: b.e}, end=False)
        b.stage(grid.times[i + 1], b.r[0] + dt / 2 * (b.r[1] + b.e))
    return b.table(grid.times[start:], _levels(grid, start), 1.0, start)


def _levels(grid: Grid, start: int) -> list[tuple[float, float]]:
    return [(float(1 - s), float(s)) for s in grid.sigmas[start:-1]]
