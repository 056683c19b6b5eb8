"""Euler and its ancestral form, in sigma space: x = x0 + sigma * noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import LdmfastError
from .schedules import Schedule
from .spacing import Grid, sigma_grid
from .step_table import StepTable, TableBuilder


def input_scale(sigma: float) -> float:
    """c_in of a variance-preserving network fed from sigma space (Karras et al. 2022, table 1)."""
    return 1 / math.sqrt(sigma**2 + 1)


def start_sigma(schedule: Schedule, grid: Grid) -> float:
    """Noise factor of a run from pure noise; diffusers counts the picture's variance in for leading
    spacing."""
    top = float(grid.sigmas.max())
    return top if schedule.timestep_spacing in ("linspace", "trailing") else math.hypot(top, 1)


def sigma_levels(grid: Grid, start: int) -> list[tuple[float, float]]:
    return [(1.0, float(s)) for s in grid.sigmas[start:-1]]


def euler(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
          sigmas: Sequence[float] | None = None, start: int = 0, s_churn: float = 0.0, s_tmin: float = 0.0,
          s_tmax: float = math.inf, s_noise: float = 1.0) -> StepTable:
    """Euler steps of the probability-flow ODE dx/dsigma = (x - x0) / sigma, Karras et al. 2022, algorithm 2
    without the correction; diffusers' EulerDiscreteScheduler. Order 1.

    ``s_churn`` > 0 first raises the noise from sigma to sigma (1 + gamma) while s_tmin <= sigma <= s_tmax
    (there lines 4 to 6); as in diffusers the network saw the state before that.
    """
    if s_churn < 0:
        raise LdmfastError(f"euler: s_churn={s_churn}, must not be negative")
    grid = sigma_grid(schedule, steps, timesteps, sigmas, ends_at_zero=False)
    b = TableBuilder("euler", schedule)
    times = grid.times
    if schedule.timestep_type == "continuous" and schedule.prediction_type == "v_prediction":
        times = 0.25 * np.log(grid.sigmas[:-1])
    gamma_max = min(s_churn / (len(grid.sigmas) - 1), math.sqrt(2) - 1)
    for i in range(start, len(times)):
        sigma, sigma_next = grid.sigmas[i], grid.sigmas[i + 1]
        gamma = gamma_max if s_tmin <= sigma <= s_tmax else 0.0
        hat = sigma * (1 + gamma)
        x = b.x + s_noise * math.sqrt(hat**2 - sigma**2) * b.noise if gamma > 0 else b.x
        # v keeps the network's own sigma, epsilon the raised one: diffusers' reading of the churned state
        x0, _ = b.predict(1.0, sigma if schedule.prediction_type == "v_prediction" else hat, x)
        b.stage(times[i], x + (x - x0) / hat * (sigma_next - hat), c_in=input_scale(sigma))
    return b.table(times[start:], sigma_levels(grid, start), start_sigma(schedule, grid), start)


def ancestral_split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up): step down to ``down``, then add ``up`` of fresh noise, which ends at sigma_next."""
    up = eta * math.sqrt(max(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2, 0.0))
    up = min(up, sigma_next)
    return math.sqrt(max(sigma_next**2 - up**2, 0.0)), up


def euler_a(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
            sigmas: Sequence[float] | None = None, start: int = 0, eta: float = 1.0) -> StepTable:
    """Ancestral Euler: an Euler step to sigma_down, then noise of sigma_up, with sigma_down^2 + sigma_up^2 =
    sigma_next^2 and sigma_up the posterior deviation of the variance-exploding chain (Song et al. 2021, score
    SDE, appendix F); diffusers' EulerAncestralDiscreteScheduler. ``eta`` scales sigma_up; 0 is Euler.
    """
    if not 0 <= eta <= 1:
        raise LdmfastError(f"euler_a: eta={eta}, must be in [0, 1]")
    grid = sigma_grid(schedule, steps, timesteps, sigmas)
    b = TableBuilder("euler_a", schedule)
    for i in range(start, len(grid.times)):
        sigma, sigma_next = grid.sigmas[i], grid.sigmas[i + 1]
        down, up = ancestral_split(sigma, sigma_next, eta)
        x0, _ = b.predict(1.0, sigma)
        b.stage(grid.times[i], b.x + (b.x - x0) / sigma * (down - sigma) + up * b.noise,
                c_in=input_scale(sigma))
    return b.table(grid.times[start:], sigma_levels(grid, start), start_sigma(schedule, grid), start)
