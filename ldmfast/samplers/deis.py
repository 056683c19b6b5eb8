"""DEIS: exponential integrator with polynomial extrapolation of the noise prediction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import LdmfastError
from .dpmpp import Levels
from .schedules import Array, Schedule
from .spacing import Grid, flow_grid, log_snr_grid
from .step_table import StepTable, TableBuilder


def deis(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
         sigmas: Sequence[float] | None = None, start: int = 0, order: int = 2,
         lower_order_final: bool = True) -> StepTable:
    """Diffusion exponential integrator sampler, log-rho multistep, Zhang & Chen 2023, eq. 15 with
    polynomials in log rho, rho = sigma / alpha; diffusers' DEISMultistepScheduler. ``order`` 1 to 3, one
    evaluation a step.

    x' = alpha' (x / alpha + sum_k C_k eps_k), C_k the integral over rho of the k-th Lagrange polynomial in
    log rho. It ends at the smallest training sigma, or repeats the last one of a respaced list (an idle last
    step), as in diffusers; never at sigma 0.
    """
    if order not in (1, 2, 3):
        raise LdmfastError(f"deis: order={order}, must be 1, 2 or 3")
    grid = _grid(schedule, steps, timesteps, sigmas)
    if grid.sigmas[-1] == 0:
        raise LdmfastError("deis: log rho has no value at sigma 0; end the sigmas above it")
    level = Levels(schedule, grid.sigmas)
    n = len(grid.times)
    b = TableBuilder("deis", schedule, registers=max(order - 1, 1), clips=schedule.thresholding)
    rho = level.sigma / level.alpha
    for i in range(start, n):
        x0, eps = b.predict(level.alpha[i], level.sigma[i])
        if b.clip:
            eps = (b.x - level.alpha[i] * x0) / level.sigma[i]
        m = [eps, *b.r]
        known = min(order, level.distinct(start, i))
        if lower_order_final and n < 15:
            known = min(known, n - i)
        nodes = rho[i - known + 1:i + 1][::-1]
        weights = _log_rho_weights(nodes, rho[i], rho[i + 1])
        row = level.alpha[i + 1] * (b.x / level.alpha[i] + sum(w * e for w, e in zip(weights, m)))
        b.stage(grid.times[i], row, dict(enumerate(m[:len(b.r)])))
    return b.table(grid.times[start:], level.pairs(start), 1.0, start)


def _grid(schedule: Schedule, steps: int | None, timesteps: Sequence[float] | None,
          sigmas: Sequence[float] | None) -> Grid:
    if schedule.flow:
        return flow_grid(schedule, steps, timesteps, sigmas, kind="deis")
    return log_snr_grid(schedule, steps, timesteps, sigmas, last="repeat", round_karras=True)


def _log_rho_weights(nodes: Array, low: float, high: float) -> Array:
    """Integrals over rho in [low, high] of the Lagrange polynomials in u = log(rho / low) on the nodes.

    With J_n = integral of u^n d rho = high u^n - n J_{n-1}, u at ``high``.
    """
    u = np.log(high / low)
    at = np.log(nodes / low)
    moments = [high - low]
    for n in range(1, len(nodes)):
        moments.append(high * u**n - n * moments[-1])
    weights = []
    for k in range(len(nodes)):
        others = np.delete(at, k)
        polynomial = np.atleast_1d(np.poly(others))[::-1] / np.prod(at[k] - others)
        weights.append(float(np.dot(polynomial, moments)))
    return np.array(weights)
