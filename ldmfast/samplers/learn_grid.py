"""Learned time grids: the few steps of a run placed where they bring it nearest to a fine solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LdmfastError
from .registry import make_table
from .sample import Denoiser, sample
from .schedules import Array, Schedule
from .step_table import StepTable
from .time_grid import TimeGrid

Bind = Callable[["TimeGrid | int"], tuple[StepTable, Denoiser]]
Progress = Callable[[int, float], None]

_NUDGE = (0.02, 0.03)  # difference quotients: of log sigma, and of a tenth of the training time
_WIDE = 5  # times these while it pays: quotients over a longer way see past a picture's small jumps
# first levels over the first, last over the second of the usual grid's, even in log sigma but for the first step, which
# is so many times the others
_STARTS = ((3.0, 2.5, 1.0), (6.0, 2.5, 1.0), (3.5, 2.5, 1.5))
_LEAP = 0.6  # the most that one iteration moves either, in the same units
_ENOUGH = 0.01  # after an iteration that gains less, relative to the error, quotients are narrow; the third ends it


def learn_grid(bind: Bind, noise: Tensor, target: Tensor, schedule: Schedule, solver: str, steps: int, *,
               iterations: int = 8, progress: Progress | None = None) -> TimeGrid:
    """The noise levels and network times with which ``solver`` ends nearest to ``target``.

    Both lists of LD3 (Tong et al. 2024, section 4) are free: a network that is told another time than the solver's may
    land nearer. Its objective is minimised by Gauss-Newton steps with damping (Marquardt 1963) rather than by
    stochastic gradients: there are a dozen unknowns and thousands of residuals, so the derivatives by differences cost
    as many runs as there are unknowns, and need nothing of the network but its forward. What lies before the step
    that is nudged is not computed again. The differences are wide at first: where small changes turn one thing into
    another, narrow ones tell little of what a real step does. The search starts from the best of the usual grid and
    some that are even in log sigma, or nearly. Minimised are the pictures' root mean squares, half their arithmetic
    mean, half their geometric (of the logarithms), by reweighted squares: the few pictures in which a small change
    turns one thing into another, whose derivatives tell little, then do not outweigh the others.

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
    unknowns = _Unknowns.of(usual, schedule.for_solver(solver), solver)
    fit = _Fit(bind, noise, target, unknowns, solver)
    run = min((fit.run(p) for p in unknowns.starts()), key=lambda run: run.typical)
    damping, small = 0.03, 0
    for iteration in range(iterations):
        found = fit.improved(run, damping, 1 if small else _WIDE)
        if found is None and small:
            break
        before, (run, damping) = run.typical, found or (run, damping)
        if progress is not None:
            progress(iteration + 1, run.error)
        small = small + 1 if run.typical > before - _ENOUGH else 0
        if small == 3:
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
    noise and stays), then how far the network times are from those that the solver has for these levels, in tenths of
    the training time. A level that moves takes its time along: with the times themselves in their place the two are
    all but one unknown, and the search creeps along a narrow valley."""

    usual: Array
    levels: int
    first: float | None
    unit: float
    latest: float
    own: Callable[[list[float]], Array]

    @classmethod
    def of(cls, table: StepTable, schedule: Schedule, solver: str) -> _Unknowns:
        """Those of a table, from its own grid."""
        alpha, sigma = table.noise_levels[:-1].T
        n, first = schedule.num_train_timesteps, None
        if schedule.flow:  # a list that is given is shifted
            sigma = sigma / (schedule.shift - (schedule.shift - 1) * sigma)
            first, sigma = float(sigma[0]), np.clip(sigma[1:], 1e-3, 1 - 1e-3)
            alpha = 1 - sigma
        return cls(np.append(np.log(sigma / alpha), np.zeros(table.num_stages)), len(sigma), first, n / 10,
                   10.0 if schedule.flow else 10.0 * (n - 1) / n,
                   lambda sigmas: make_table(schedule, solver, sigmas=sigmas).network_times / (n / 10))

    def starts(self) -> list[Array]:
        """The usual grid, and for solvers that may begin at any level some that are even in log sigma."""
        found = [self.usual]
        if self.first is None and self.levels > 2:
            for later, lower, first in _STARTS:
                p = self.usual.copy()
                even = np.append(0, np.arange(self.levels - 1) + first)
                p[:self.levels] = np.interp(even, even[[0, -1]], p[[0, self.levels - 1]] - np.log([later, lower]))
                found.append(p)
        return [p for p in found if self.falls(p)]

    def falls(self, p: Array) -> bool:
        """Whether the levels are in order, and not too near to each other for a difference quotient."""
        return bool((np.diff(p[:self.levels]) < -0.05).all())

    def sigmas(self, p: Array) -> list[float]:
        sigmas = np.exp(p[:self.levels])
        return [*sigmas.tolist(), 0.0] if self.first is None else [self.first, *(sigmas / (1 + sigmas)).tolist()]

    def within(self, p: Array) -> Array:
        """p with network times that networks know."""
        own = self.own(self.sigmas(p))
        return np.append(p[:self.levels], np.clip(own + p[self.levels:], 0, self.latest) - own)

    def lists(self, p: Array) -> tuple[list[float], list[float]]:
        """(sigmas, network times)"""
        sigmas = self.sigmas(p)
        return sigmas, ((self.own(sigmas) + self.within(p)[self.levels:]) * self.unit).tolist()

    def nudge(self, p: Array, k: int, wide: float) -> float:
        """A change of one unknown that keeps within its bounds: the levels beside it, and the latest time."""
        step = wide * _NUDGE[k >= self.levels]
        if k < self.levels:
            above = p[k - 1] - p[k] if k else np.inf
            below = p[k] - p[k + 1] if k + 1 < self.levels else np.inf
            return float(min(step, above / 3) if above >= below else -min(step, below / 3))
        late = self.own(self.sigmas(p))[k - self.levels] + p[k] + step > self.latest
        return -step if late else step


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
        """What is minimised: the logarithm of the errors' mean, half of it of the arithmetic, half of the geometric."""
        return float(self.errors.log().mean() + self.errors.mean().log()) / 2

    @property
    def weights(self) -> Tensor:
        """(pictures,) of each squared error, as the gradient of ``typical`` has them."""
        errors = self.errors.clamp(min=1e-3 * self.error + 1e-12)
        return 1 / (errors * errors) + 1 / (errors * self.error)


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

    def improved(self, run: _Run, damping: float, wide: float) -> tuple[_Run, float] | None:
        """A better run and the next damping, or None if no step along the Gauss-Newton direction is one."""
        columns = []
        for k in range(len(run.p)):
            step = self.unknowns.nudge(run.p, k, wide)
            nudged = run.p.copy()
            nudged[k] += step
            columns.append((self.run(nudged, run).end.double() - run.end.double()).flatten(1) / step)
        slopes = torch.stack(columns, 2)
        away = (run.end.double() - self.target.double()).flatten(1)
        square = torch.einsum("ndp,ndq,n->pq", slopes, slopes, run.weights).cpu().numpy()
        slope = torch.einsum("ndp,nd,n->p", slopes, away, run.weights).cpu().numpy()
        for _ in range(6):
            ridge = damping * np.diag(square.diagonal()) + 1e-12 * np.trace(square) * np.eye(len(square))
            p = run.p + np.clip(np.linalg.solve(square + ridge, -slope), -_LEAP, _LEAP)
            if self.unknowns.falls(p):
                tried = self.run(self.unknowns.within(p))
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
