"""Stochastic interpolants between any two laws: sampled as an ODE or as an SDE of any diffusion, either way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ..errors import LdmfastError
from .schedules import Schedule
from .sit import Function
from .step_table import StepTable, TableBuilder

X = TypeVar("X")


@dataclass(frozen=True)
class Bridge:
    """x_t = alpha(t) x0 + beta(t) x1 + gamma(t) z with z ~ N(0, 1), t from 0 to 1, and the derivatives of the three:
    Albergo et al. 2023, definition 2.1 for a linear I. alpha(0) = beta(1) = 1; the others are 0 at both ends, and gamma
    is positive in between. x0 and x1 are drawn from any two laws, together or apart."""

    alpha: Function
    beta: Function
    gamma: Function
    alpha_slope: Function
    beta_slope: Function
    gamma_slope: Function

    def velocity(self, t: float, x0: X, x1: X, z: X) -> X:
        """b = alpha' E[x0 | x] + beta' E[x1 | x] + gamma' E[z | x], for a network that predicts the parts."""
        return self.alpha_slope(t) * x0 + self.beta_slope(t) * x1 + self.gamma_slope(t) * z  # type: ignore


_PI = math.pi
_GAMMA = (lambda t: math.sin(_PI * min(t, 1 - t)) ** 2, lambda t: _PI * math.sin(2 * _PI * t))
BRIDGES = {
    "linear": Bridge(lambda t: 1 - t, lambda t: t, _GAMMA[0], lambda t: -1.0, lambda t: 1.0, _GAMMA[1]),
    "trigonometric": Bridge(lambda t: math.cos(_PI / 2 * t), lambda t: math.sin(_PI / 2 * t), _GAMMA[0],
                            lambda t: -_PI / 2 * math.sin(_PI / 2 * t), lambda t: _PI / 2 * math.cos(_PI / 2 * t),
                            _GAMMA[1]),
    # all of x0 becomes noise, and the noise all of x1
    "encoding-decoding": Bridge(
        lambda t: math.cos(_PI * t) ** 2 if t < 0.5 else 0.0, lambda t: math.cos(_PI * t) ** 2 if t > 0.5 else 0.0,
        _GAMMA[0], lambda t: -_PI * math.sin(2 * _PI * t) if t < 0.5 else 0.0,
        lambda t: -_PI * math.sin(2 * _PI * t) if t > 0.5 else 0.0, _GAMMA[1]),
}


def bridge(steps: int | None = None, *, path: str | Bridge = "linear", diffusion: float | Function = 0.0,
           heun: bool = False, backward: bool = False, times: Sequence[float] | None = None) -> StepTable:
    """The step table between two laws, for a network that predicts a pair: the velocity b = E[dx_t/dt | x] and the
    denoiser eta = E[z | x] (Albergo et al. 2023, equations 2.10 and 2.14).

    The score is -eta / gamma, and for every epsilon(t) >= 0 the SDE dx = (b - epsilon eta / gamma) dt + sqrt(2 epsilon)
    dW has the laws of the ODE dx = b dt (section 2.3); backward, from x1 to x0, the sign of epsilon turns.

    steps: of equal length, or times: rising from 0 to 1, or parts of it. The run starts from draws of the law at its
    first time; backward the same times are walked from their end. path: a name in BRIDGES, or any Bridge. diffusion:
    epsilon; a number a means a gamma(t), which vanishes where gamma does, as it has to. heun: second order, for the
    ODE. Raises LdmfastError for unknown names and values out of range.
    """
    curve, grid = _curve(path), _grid(steps, times)
    if heun and diffusion != 0.0:
        raise LdmfastError("bridge: heun is for the ODE; leave diffusion out, or heun")
    ratio = _ratio(diffusion, curve)  # epsilon / gamma
    grid = grid[::-1] if backward else grid
    b = TableBuilder("bridge", Schedule(flow=True, prediction_type="flow_prediction"), registers=2 if heun else 0)
    weights: list[tuple[float, float]] = []
    for i, (t, after) in enumerate(itertools.pairwise(grid)):
        dt = after - t
        if heun:
            b.stage(t, b.x + dt * b.e, {0: b.x, 1: b.e}, end=False)
            b.stage(after, b.r[0] + dt / 2 * (b.r[1] + b.e))
            weights += [(1.0, 0.0)] * 2
            continue
        share = 0.0 if i == len(grid) - 2 else ratio(t)  # the last step adds no noise
        b.stage(t, b.x + dt * b.e + math.sqrt(2 * share * curve.gamma(t) * abs(dt)) * b.noise)
        weights.append((1.0, -math.copysign(share, dt) if share else 0.0))
    levels = [(1.0, curve.gamma(t)) for t in grid[:-1]]
    table = b.table(np.array(grid[:-1]), levels, 1.0, 0)
    return table.with_predictions(np.array(weights), ("velocity", "denoiser"))


def _curve(path: str | Bridge) -> Bridge:
    if isinstance(path, Bridge):
        return path
    if path not in BRIDGES:
        raise LdmfastError(f"bridge: path {path!r} is not known; give {', '.join(BRIDGES)}, or a Bridge")
    return BRIDGES[path]


def _grid(steps: int | None, times: Sequence[float] | None) -> list[float]:
    if (steps is None) == (times is None):
        raise LdmfastError("bridge: give either steps or times")
    if times is None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise LdmfastError(f"bridge: steps={steps!r}, must be a whole number of at least 1")
        return [i / steps for i in range(steps + 1)]
    grid = np.asarray(times, dtype=np.float64)
    if grid.ndim != 1 or len(grid) < 2 or not (np.diff(grid) > 0).all() or not 0 <= grid[0] < grid[-1] <= 1:
        raise LdmfastError(f"bridge: times {str(list(times))[:80]} must be two or more that rise, from 0 to 1")
    return [float(t) for t in grid]


def _ratio(diffusion: float | Function, curve: Bridge) -> Function:
    if not callable(diffusion):
        if not (math.isfinite(diffusion) and diffusion >= 0):
            raise LdmfastError(f"bridge: diffusion={diffusion}, must be a finite number of at least 0, or a function "
                               "of t")
        constant = float(diffusion)
        return lambda t: constant

    def ratio(t: float) -> float:
        epsilon, gamma = diffusion(t), curve.gamma(t)
        if epsilon < 0 or (epsilon > 0 and gamma <= 0):
            raise LdmfastError(f"bridge: diffusion is {epsilon:g} at t = {t:g}, where gamma is {gamma:g}; it must be "
                               "at least 0, and 0 where gamma is")
        return epsilon / gamma if epsilon else 0.0

    return ratio
