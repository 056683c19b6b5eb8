"""EVODiff: a multistep rule whose coefficients come from the predicted pictures themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import LdmfastError
from .dpmpp import Levels, log_snr_levels
from .schedules import Array, Schedule
from .step_table import StepTable, TableBuilder

COLUMNS = ("corrected", "ahead")
LONG = 20  # from more steps on the authors damp the correction in another way


def evodiff(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
            sigmas: Sequence[float] | None = None, start: int = 0) -> StepTable:
    """EVODiff (Li et al. 2025, "Entropy-aware Variance Optimized Diffusion Inference"), one evaluation a step, on
    DPM-Solver's grid.

    A step goes as DDIM does and adds a multiple of m0 - r m1, a balanced difference of the last two predicted pictures;
    the evaluation there then corrects it, as in UniPC. r lies between the ratio of the steps and the projection of one
    picture on the other, and the multiples follow from projections, too, for each picture and channel: what a table
    cannot hold, ``Balance`` makes. The first step and the last are DDIM's; the authors' last one, which also scales the
    picture by constants found for theirs, is left out. Convergence is of first order. Raises LdmfastError for repeated
    noise levels.

    Registers: r0 what DDIM made of the corrected state before, r1 and r2 the older predictions.
    """
    grid = log_snr_levels(schedule, steps, timesteps, sigmas)
    level, n = Levels(schedule, grid.sigmas), len(grid.times)
    if not (np.diff(level.lam) > 0).all():
        raise LdmfastError(f"evodiff: {n} steps repeat a noise level, between which there is no difference to take; "
                           "use fewer steps")
    b = TableBuilder("evodiff", schedule, registers=3, adapts=COLUMNS)
    for i in range(start, n):
        b.predict(level.alpha[i], level.sigma[i])
        ratio = level.sigma[i + 1] / level.sigma[i]
        balance = Balance.of(level, grid.times, schedule.num_train_timesteps, start, i)
        x = b.x if balance.last is None else b.r[0] + b.adapted["corrected"]
        row = ratio * x + (level.alpha[i + 1] - ratio * level.alpha[i]) * b.adapted["x0"]
        ahead = row if balance.next is None else row + b.adapted["ahead"]
        b.stage(grid.times[i], ahead, {0: row, 1: b.adapted["x0"], 2: b.r[1]}, adapt=balance)
    return b.table(grid.times[start:], level.pairs(start), 1.0, start)


@dataclass(frozen=True)
class Step:
    """Numbers of the step from one level to the next. scale: half of DDIM's coefficient of the picture. h: that over
    sigma at its end. r: the step in log SNR before, over this one. ratio: of sigma, end to start. base, weight: of the
    balance."""

    scale: float
    h: float
    r: float
    ratio: float
    base: float
    weight: float

    @classmethod
    def of(cls, level: Levels, times: Array, total: int, i: int) -> Step:
        sigma, ratio = level.sigma[i + 1], level.sigma[i + 1] / level.sigma[i]
        h = level.alpha[i + 1] / sigma - level.alpha[i] / level.sigma[i]
        t = (times[i + 1] + 2) / (total + 1)  # (t + t_0) / (T + t_0) where t runs from t_0 = 1 / N to T = 1
        return cls(0.5 * sigma * h, h, (level.lam[i] - level.lam[i - 1]) / (level.lam[i + 1] - level.lam[i]), ratio,
                   math.sqrt(ratio / (level.sigma[i] / level.sigma[i - 1])), 0.5 * (1 - t * t))

    def difference(self, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """(new - r old, r)"""
        r = (1 - self.weight) * self.base + self.weight * _projection(new, old)
        return new - r * old, r

    def ahead(self, r: Tensor) -> Tensor:
        """The factor of the difference in the move that the next evaluation will correct."""
        return self.scale / (torch.sigmoid(0.25 * r.abs()) * self.r)


@dataclass(frozen=True)
class Balance:
    """What is not linear at one level: the correction of the step that led there (``last``) and the move ahead in the
    ``next``; None for steps that are DDIM's. long: one of more than 20 steps."""

    last: Step | None
    next: Step | None
    long: bool

    @classmethod
    def of(cls, level: Levels, times: Array, total: int, start: int, i: int) -> Balance:
        inner = start < i < len(times) - 1
        return cls(Step.of(level, times, total, i - 1) if i > start + 1 else None,
                   Step.of(level, times, total, i) if inner else None, len(times) > LONG)

    def __call__(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values of ``COLUMNS`` from the picture predicted here ("x0") and the registers."""
        found = {}
        if self.last is not None:
            found["corrected"] = self._correction(self.last, columns["x0"], columns["r1"], columns["r2"])
        if self.next is not None:
            difference, r = self.next.difference(columns["x0"], columns["r1"])
            found["ahead"] = self.next.ahead(r) * difference
        return found

    def _correction(self, step: Step, new: Tensor, old: Tensor, older: Tensor) -> Tensor:
        before, r = step.difference(old, older)
        after, _ = step.difference(new, old)
        low, high = before / step.r, step.r * after
        eta = 0.5 * torch.sigmoid((0.5 * _projection(high + low, high - low)).abs())
        theta = (1 - eta) * high - eta * low
        rest = step.ahead(r) * (before - theta)
        zeta = (_projection(rest, before) / (2 * step.scale)).abs() - 0.5
        if self.long:
            zeta = -zeta * torch.sigmoid(_projection(old, (old - older) / step.h) * (2 - step.ratio**2))
        return step.scale / torch.sigmoid(zeta) * theta


def _projection(a: Tensor, b: Tensor) -> Tensor:
    """a . b / b . b of each picture's channels (of each picture, where it has none), within [-2, 2]."""
    axes = tuple(range(2 if b.ndim > 2 else 1, b.ndim))
    square = (b * b).sum(axes, keepdim=True)
    return ((a * b).sum(axes, keepdim=True) / square.clamp(min=torch.finfo(b.dtype).tiny)).clamp(-2, 2)
