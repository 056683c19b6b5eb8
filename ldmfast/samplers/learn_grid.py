"""Learned time grids: the few steps of a run placed where they bring it nearest to a fine solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LdmfastError
from .sample import Denoiser, sample
from .schedules import Array, Schedule
from .step_table import StepTable
from .time_grid import TimeGrid

Bind = Callable[["TimeGrid | int"], tuple[StepTable, Denoiser]]
Progress = Callable[[int, float], None]

_NUDGE = (0.02, 0.03)  # difference quotients: of log sigma, and of a tenth of the training time
_LEAP = 0.6  # the most that one iteration moves either, in the same units
_ENOUGH = 0.01  # two iterations in a row that gain less, relative to the error, end it


def learn_grid(bind: Bind, noise: Tensor, target: Tensor, schedule: Schedule, solver: str, steps: int, *,
               iterations: int = 8, progress: Progress | None = None) -> TimeGrid:
    """The noise levels and network times with which ``solver`` ends nearest to ``target``.

    Both lists of LD3 (Tong et al. 2024, section 4) are free: a network that is told another time than the solver's may
    land nearer. Its objective is minimised by Gauss-Newton steps with damping (Marquardt 1963) rather than by
    stochastic gradients: there are a dozen unknowns and thousands of residuals, so the derivatives by differences cost
    as many runs as there are unknowns, and need nothing of the network but its forward. What lies before the step
    that is nudged is not computed again. Minimised is the geometric mean of the pictures' root mean squares, by
    reweighted squares: the few pictures in which a small change turns one thing into another, whose derivatives tell
    nothing, then weigh no more than the others.

    bind(grid or number of steps): the step table of that grid, or of the solver's usual one, and a denoiser for it. Its
    answers must not depend on earlier ones: evaluations before the nudged step are not asked for again.
    noise: (pictures, ...) unit noise, the start. target: (pictures, ...) what a fine solve makes of it. schedule: the
    one in the tables. progress(iteration, error) is called after each iteration.
    Raises LdmfastError for a solver that draws noise, and for shapes that differ.
    """
    if noise.shape != target.shape or noise.ndim < 2:
        raise LdmfastError(f"learn_grid: noise {tuple(noise.shape)} and target {tuple(target.shape)} must have one "
                          "shape")
    usual, denoise = bind(steps)
    if usual.needs_noise.any():
        raise LdmfastError(f"learn_grid: {usual.solver} draws noise as it runs: there is no one end to be near; "
                           "learn the steps of its ODE, for example dpmpp_2m")
    default_error = float(_errors(sample(denoise, noise * usual.init_noise_sigma, table=usual), target).mean())
    fit = _Fit(bind, noise, target, _Unknowns.of(usual, schedule.for_solver(solver)), solver)
    run, damping, small = fit.run(fit.unknowns.start), 0.03, 0
    for iteration in range(iterations):
        found = fit.improved(run, damping)
        if found is None:
            break
        before, (run, damping) = run.typical, found
        if progress is not None:
            progress(iteration + 1, run.error)
        small = small + 1 if run.typical > before - _ENOUGH else 0
        if small == 2:
            break
    if run.error >= default_error:
        raise LdmfastError(f"learn_grid: no grid of {steps} steps was found that is nearer than {solver}'s usual one "
                           f"(error {default_error:.3g}); keep that, or give more pictures or iterations")
    return replace(fit.grid(run.p), error=run.error, default_error=default_error)


def _errors(end: Tensor, target: Tensor) -> Tensor:
    """(pictures,) root mean squares."""
    return (end.double() - target.double()).square().flatten(1).mean(1).sqrt()


@dataclass(frozen=True)
class _Unknowns:
    """What is free, in units of about one: log sigma (of a flow the logit, but for the first level, which is pure
    noise and stays), then the network times in tenths of the training time."""

    start: Array
    levels: int
    first: float | None
    unit: float
    latest: float

    @classmethod
    def of(cls, table: StepTable, schedule: Schedule) -> _Unknowns:
        """Those of a table, from its own grid."""
        alpha, sigma = table.noise_levels[:-1].T
        n, first = schedule.num_train_timesteps, None
        if schedule.flow:  # a list that is given is shifted
            sigma = sigma / (schedule.shift - (schedule.shift - 1) * sigma)
            first, sigma = float(sigma[0]), np.clip(sigma[1:], 1e-3, 1 - 1e-3)
            alpha = 1 - sigma
        times = table.network_times / (n / 10)
        return cls(np.concatenate([np.log(sigma / alpha), times]), len(sigma), first, n / 10,
                   10.0 if schedule.flow else 10.0 * (n - 1) / n)

    def lists(self, p: Array) -> tuple[list[float], list[float]]:
        """(sigmas, network times)"""
        sigmas, times = np.exp(p[:self.levels]), np.clip(p[self.levels:], 0, self.latest) * self.unit
        if self.first is not None:
            return [self.first, *(sigmas / (1 + sigmas)).tolist()], times.tolist()
        return [*sigmas.tolist(), 0.0], times.tolist()

    def nudge(self, p: Array, k: int) -> float:
        """A small change of one unknown, away from its bounds: the next level's, and the latest time."""
        if k < self.levels:
            return -_NUDGE[0] if k and p[k] + 2 * _NUDGE[0] > p[k - 1] else _NUDGE[0]
        return -_NUDGE[1] if p[k] + _NUDGE[1] > self.latest else _NUDGE[1]


@dataclass(frozen=True)
class _Run:
    """One run: its unknowns, its end, the error (mean and of each picture), and what the network said."""

    p: Array
    table: StepTable
    end: Tensor
    errors: Tensor
    predictions: list[Any]

    @property
    def error(self) -> float:
        return float(self.errors.mean())

    @property
    def typical(self) -> float:
        """What is minimised: the logarithm of the errors' geometric mean."""
        return float(self.errors.log().mean())


@dataclass(frozen=True)
class _Fit:
    bind: Bind
    noise: Tensor
    target: Tensor
    unknowns: _Unknowns
    solver: str

    def grid(self, p: Array) -> TimeGrid:
        sigmas, times = self.unknowns.lists(p)
        return TimeGrid(self.solver, tuple(sigmas), tuple(times))

    def run(self, p: Array, near: _Run | None = None) -> _Run:
        """The run of a grid. What the network said in a run whose grid begins alike is not asked again."""
        table, denoise = self.bind(self.grid(p))
        same = 0 if near is None else _alike(table, near.table)
        predictions: list[Any] = []

        def remember(x: Tensor, t: float, stage: int) -> Any:
            predictions.append(near.predictions[stage] if near and stage < same else denoise(x, t, stage))
            return predictions[-1]

        end = sample(remember, self.noise * table.init_noise_sigma, table=table)
        return _Run(p, table, end, _errors(end, self.target), predictions)

    def improved(self, run: _Run, damping: float) -> tuple[_Run, float] | None:
        """A better run and the next damping, or None if no step along the Gauss-Newton direction is one."""
        columns = []
        for k in range(len(run.p)):
            step = self.unknowns.nudge(run.p, k)
            nudged = run.p.copy()
            nudged[k] += step
            columns.append((self.run(nudged, run).end.double() - run.end.double()).flatten(1) / step)
        slopes = torch.stack(columns, 2)
        away = (run.end.double() - self.target.double()).flatten(1)
        weights = 1 / run.errors.clamp(min=1e-3 * run.error + 1e-12).square()
        square = torch.einsum("ndp,ndq,n->pq", slopes, slopes, weights).cpu().numpy()
        slope = torch.einsum("ndp,nd,n->p", slopes, away, weights).cpu().numpy()
        for _ in range(6):
            ridge = damping * np.diag(square.diagonal()) + 1e-12 * np.trace(square) * np.eye(len(square))
            p = run.p + np.clip(np.linalg.solve(square + ridge, -slope), -_LEAP, _LEAP)
            p[self.unknowns.levels:] = np.clip(p[self.unknowns.levels:], 0, self.unknowns.latest)
            if (np.diff(p[:self.unknowns.levels]) < -0.05).all():
                tried = self.run(p)
                if tried.typical < run.typical:
                    return tried, max(damping / 3, 1e-4)
            damping *= 4
        return None


def _alike(table: StepTable, other: StepTable) -> int:
    """How many evaluations of two runs from one noise are the same."""
    if table.init_noise_sigma != other.init_noise_sigma:
        return 0
    same = (table.network_times == other.network_times) & (table.c_in == other.c_in)
    same[1:] &= (table.matrices == other.matrices).all(axis=(1, 2))[:-1]
    return int(np.argmin(np.append(same, False)))
