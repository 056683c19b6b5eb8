"""SiT: sampling a stochastic interpolant between noise and data, as an ODE or as an SDE of any diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import LdmfastError
from .schedules import Array, Schedule
from .step_table import StepTable, TableBuilder

Function = Callable[[float], float]


@dataclass(frozen=True)
class Interpolant:
    """x_t = alpha(t) data + sigma(t) noise for t from 0 (noise) to 1 (data), and the derivatives of both: Albergo et
    al. 2023, section 2, with a Gaussian start. alpha(0) = sigma(1) = 0; in between neither is zero."""

    alpha: Function
    sigma: Function
    alpha_slope: Function
    sigma_slope: Function


_QUARTER = math.pi / 2
PATHS = {
    "linear": Interpolant(lambda t: t, lambda t: 1 - t, lambda t: 1.0, lambda t: -1.0),
    # variance preserving (GVP)
    "trigonometric": Interpolant(lambda t: math.sin(_QUARTER * t), lambda t: math.cos(_QUARTER * t),
                                 lambda t: _QUARTER * math.cos(_QUARTER * t),
                                 lambda t: -_QUARTER * math.sin(_QUARTER * t)),
}
# w(t) of Ma et al. 2024, section 3.3; "sigma" is the noise level of the path
DIFFUSIONS: dict[str, Callable[[Interpolant, float], float]] = {
    "constant": lambda path, t: 1.0,
    "sigma": lambda path, t: path.sigma(t),
    "increasing-decreasing": lambda path, t: math.sin(math.pi * t) ** 2,
}


def sit(steps: int | None = None, *, path: str | Interpolant = "linear", diffusion: str | Function | None = None,
        scale: float = 1.0, heun: bool = False, times: Sequence[float] | None = None) -> StepTable:
    """The step table of a network that predicts the velocity of an interpolant (Ma et al. 2024, SiT).

    The velocity v = alpha' E[data | x] + sigma' E[noise | x] also tells the score (equation 9),
    s = (alpha v - alpha' x) / (sigma (alpha' sigma - alpha sigma')), and for every w(t) >= 0 the SDE
    dx = (v + w s / 2) dt + sqrt(w) dW has the same laws at all t as the ODE dx = v dt (equation 7).

    steps: of equal length, or times: rising, from 0 or later to before 1. path: a name in PATHS, or any Interpolant.
    diffusion: None for the ODE, a name in DIFFUSIONS or a function of t, times ``scale``. heun: second order, two
    evaluations a step, for the ODE. The last step gives the data that the network expects, E[data | x].
    The network is told t; a run starts from unit noise. Raises LdmfastError for unknown names and values out of range.
    """
    curve = _path(path)
    grid = _grid(steps, times)
    if heun and diffusion is not None:
        raise LdmfastError("sit: heun is for the ODE; leave diffusion out, or heun")
    w = _diffusion(diffusion, curve, scale)
    b = TableBuilder("sit", Schedule(flow=True, prediction_type="flow_prediction"), registers=2 if heun else 0)
    last = len(grid) - 1
    for i, t in enumerate(grid):
        alpha, sigma, rise, fall = curve.alpha(t), curve.sigma(t), curve.alpha_slope(t), curve.sigma_slope(t)
        wronskian = rise * sigma - alpha * fall
        if not (sigma > 0 and wronskian > 0):
            raise LdmfastError(f"sit: the path has sigma = {sigma:g} and alpha' sigma - alpha sigma' = {wronskian:g} "
                               f"at t = {t:g}, both must be positive before the end")
        if i == last:
            b.stage(t, (sigma * b.e - fall * b.x) / wronskian)
            continue
        dt = grid[i + 1] - t
        if heun:
            b.stage(t, b.x + dt * b.e, {0: b.x, 1: b.e}, end=False)
            b.stage(grid[i + 1], b.r[0] + dt / 2 * (b.r[1] + b.e))
            continue
        score = (alpha * b.e - rise * b.x) / (sigma * wronskian)
        b.stage(t, b.x + dt * (b.e + w(t) / 2 * score) + math.sqrt(w(t) * dt) * b.noise)
    levels = [(curve.alpha(t), curve.sigma(t)) for t in grid]
    return b.table(np.array(grid), levels, 1.0, 0)


def _path(path: str | Interpolant) -> Interpolant:
    if isinstance(path, Interpolant):
        return path
    if path not in PATHS:
        raise LdmfastError(f"sit: path {path!r} is not known; give {', '.join(PATHS)}, or an Interpolant")
    return PATHS[path]


def _grid(steps: int | None, times: Sequence[float] | None) -> list[float]:
    if (steps is None) == (times is None):
        raise LdmfastError("sit: give either steps or times")
    if times is None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise LdmfastError(f"sit: steps={steps!r}, must be a whole number of at least 1")
        return [i / steps for i in range(steps)]
    grid: Array = np.asarray(times, dtype=np.float64)
    if grid.ndim != 1 or not grid.size or not (np.diff(grid) > 0).all() or not 0 <= grid[0] <= grid[-1] < 1:
        raise LdmfastError(f"sit: times {str(list(times))[:80]} must rise, from 0 or later to before 1")
    return [float(t) for t in grid]


def _diffusion(diffusion: str | Function | None, path: Interpolant, scale: float) -> Function:
    if not (math.isfinite(scale) and scale >= 0):
        raise LdmfastError(f"sit: scale={scale}, must be a finite number of at least 0")
    if diffusion is None:
        return lambda t: 0.0
    if callable(diffusion):
        return lambda t: scale * diffusion(t)
    if diffusion not in DIFFUSIONS:
        raise LdmfastError(f"sit: diffusion {diffusion!r} is not known; give {', '.join(DIFFUSIONS)}, or a function of "
                           "t")
    named = DIFFUSIONS[diffusion]
    return lambda t: scale * named(path, t)
