"""UniPC: a predictor and a corrector that share one evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import LdmfastError
from .dpmpp import Levels
from .schedules import Array, Schedule
from .spacing import Grid, flow_grid, log_snr_grid
from .step_table import StepTable, TableBuilder


def unipc(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
          sigmas: Sequence[float] | None = None, start: int = 0, order: int = 2, solver_type: str = "bh2",
          predict_x0: bool = True, lower_order_final: bool = True,
          disable_corrector: Sequence[int] = ()) -> StepTable:
    """Unified predictor-corrector, Zhao et al. 2023, algorithms 5 to 8 (UniP-p and UniC-p); diffusers'
    UniPCMultistepScheduler. Order ``order`` (1 to 3), one evaluation a step.

    ``solver_type`` "bh1" takes B(h) = h, "bh2" B(h) = exp(h) - 1 (section 3.3). ``predict_x0`` integrates the
    data prediction, otherwise the noise prediction (which cannot end at sigma 0). ``disable_corrector`` lists
    step numbers whose result is not corrected. ``lower_order_final`` lets the order fall to 1 at the end; a
    step that ends at sigma 0 has order 1 always.

    Registers: r0 the corrected state of the step before, r1.. the older predictions, newest first.
    """
    if order not in (1, 2, 3):
        raise LdmfastError(f"unipc: order={order}, must be 1, 2 or 3")
    if solver_type not in ("bh1", "bh2"):
        raise LdmfastError(f"unipc: solver_type={solver_type!r}, must be bh1 or bh2")
    grid = _grid(schedule, steps, timesteps, sigmas)
    if not predict_x0 and grid.sigmas[-1] == 0:
        raise LdmfastError("unipc: predict_x0=False cannot end at sigma 0; use final_sigmas_type='sigma_min'")
    level = Levels(schedule, grid.sigmas)
    n = len(grid.times)
    b = TableBuilder("unipc", schedule, registers=1 + order, clips=schedule.thresholding and predict_x0)
    last_order = 0
    for i in range(start, n):
        x0, eps = b.predict(level.alpha[i], level.sigma[i])
        m = [x0 if predict_x0 else eps, *b.r[1:]]
        x = b.x
        if i > start and i - 1 not in disable_corrector:
            x = _update(level, i - 1, b.r[0], m[1:], m[0], last_order, solver_type, predict_x0)
        last_order = min(order, n - i) if lower_order_final else order
        last_order = min(last_order, level.distinct(start, i))
        if grid.sigmas[i + 1] == 0 or level.lam[i + 1] == level.lam[i]:
            last_order = 1  # an infinite or an idle step has no differences
        row = _update(level, i, x, m, None, last_order, solver_type, predict_x0)
        b.stage(grid.times[i], row, {0: x, **{1 + k: m[k] for k in range(order)}})
    return b.table(grid.times[start:], level.pairs(start), 1.0, start)


def _grid(schedule: Schedule, steps: int | None, timesteps: Sequence[float] | None,
          sigmas: Sequence[float] | None) -> Grid:
    if schedule.flow:
        return flow_grid(schedule, steps, timesteps, sigmas, kind="unipc")
    return log_snr_grid(schedule, steps, timesteps, sigmas, last="unipc", round_karras=True)


def _update(level: Levels, i: int, x: Array, m: list[Array], new: Array | None, order: int, solver_type: str,
            predict_x0: bool) -> Array:
    """The step from boundary i to i + 1: the predictor, or, given the prediction ``new`` at its end, the
    corrector.

    x' = linear part - scale B(h) sum_k rho_k D_k with D_k = (m_k - m_0) / r_k, the rho solving the order
    conditions (Zhao et al. 2023, eq. 5 and 9).
    """
    h = level.lam[i + 1] - level.lam[i]
    hh = -h if predict_x0 else h
    grow = math.expm1(hh)
    b_h = hh if solver_type == "bh1" else grow
    if predict_x0:
        scale, carry = level.alpha[i + 1], level.sigma[i + 1] / level.sigma[i]
    else:
        scale, carry = level.sigma[i + 1], level.alpha[i + 1] / level.alpha[i]
    row = carry * x - scale * grow * m[0]
    ratios = [(level.lam[i - k] - level.lam[i]) / h for k in range(1, order)]
    differences = [(m[k] - m[0]) / r for k, r in enumerate(ratios, 1)]
    if new is None and order == 1:
        return row
    if new is not None:
        differences.append(new - m[0])
        rho = _order_conditions([*ratios, 1.0], hh, b_h) if order > 1 else np.array([0.5])
    else:
        rho = _order_conditions(ratios, hh, b_h) if order > 2 else np.full(order - 1, 0.5)
    return row - scale * b_h * sum((r * d for r, d in zip(rho, differences)), np.zeros_like(row))


def _order_conditions(ratios: list[float], hh: float, b_h: float) -> Array:
    """Solve sum_k r_k^(j-1) rho_k = j! phi_{j+1}(hh) hh / B(h), j = 1, 2, ... (Zhao et al. 2023, eq. 9)."""
    n = len(ratios)
    phi = math.expm1(hh) / hh - 1
    factorial = 1
    right = []
    for j in range(1, n + 1):
        right.append(phi * factorial / b_h)
        factorial *= j + 1
        phi = phi / hh - 1 / factorial
    matrix = np.array([[r ** (j - 1) for r in ratios] for j in range(1, n + 1)])
    return np.linalg.solve(matrix, np.array(right))
