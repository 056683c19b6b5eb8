"""DPM-Solver++ and DPM-Solver, multistep, as ODE and SDE solvers of order 1 to 3."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import LdmfastError
from .schedules import Array, Schedule
from .spacing import Grid, flow_grid, log_snr_grid
from .step_table import StepTable, TableBuilder

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")


class Levels:
    """alpha, sigma and log SNR lambda = log(alpha / sigma) at the steps + 1 boundaries of a grid."""

    def __init__(self, schedule: Schedule, sigmas: Array) -> None:
        if schedule.flow:
            self.alpha, self.sigma = 1 - sigmas, sigmas
        else:
            self.alpha = 1 / np.sqrt(sigmas**2 + 1)
            self.sigma = sigmas * self.alpha
        with np.errstate(divide="ignore"):
            self.lam = np.log(self.alpha) - np.log(self.sigma)

    def distinct(self, start: int, i: int) -> int:
        """How many of the boundaries start..i, counted back from i, lie at different levels: an idle step (repeated
        time) leaves two predictions at one lambda, between which there is no difference to take."""
        k = 1
        while i - k >= start and self.lam[i - k] < self.lam[i - k + 1]:
            k += 1
        return k

    def pairs(self, start: int) -> list[tuple[float, float]]:
        return [(float(a), float(s)) for a, s in zip(self.alpha[start:-1], self.sigma[start:-1])]


def log_snr_levels(schedule: Schedule, steps: int | None, timesteps: Sequence[float] | None,
                   sigmas: Sequence[float] | None) -> Grid:
    """The grid of DPMSolverMultistepScheduler, variance preserving or flow."""
    if schedule.flow:
        return flow_grid(schedule, steps, timesteps, sigmas, kind="dpm")
    return log_snr_grid(schedule, steps, timesteps, sigmas, last="config",
                        round_karras=schedule.beta_schedule != "squaredcos_cap_v2")


def dpmpp_2m(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
             sigmas: Sequence[float] | None = None, start: int = 0, order: int = 2,
             algorithm: str = "dpmsolver++", solver_type: str = "midpoint", lower_order_final: bool = True,
             euler_at_final: bool = False) -> StepTable:
    """DPM-Solver++(2M), Lu et al. 2022 (DPM-Solver++), algorithm 2; diffusers' DPMSolverMultistepScheduler.

    ``order`` 1 to 3; ``algorithm`` "dpmsolver++" integrates the data prediction (eq. 9), "dpmsolver" the
    noise prediction (Lu et al. 2022, DPM-Solver, eq. 3.7; it cannot end at sigma 0). ``solver_type``
    "midpoint" or "heun" weights the difference term. ``lower_order_final`` falls to order 1 in the last of
    fewer than 15 steps (order 3: to 2 in the last but one), ``euler_at_final`` always; so does a run that
    ends at sigma 0.
    """
    if algorithm not in ALGORITHMS[:2]:
        raise LdmfastError(f"dpmpp_2m: algorithm={algorithm!r}, must be dpmsolver++ or dpmsolver; "
                           "for the SDE forms use dpmpp_2m_sde")
    return _multistep("dpmpp_2m", schedule, steps, timesteps, sigmas, start, order, algorithm, solver_type,
                      lower_order_final, euler_at_final, 0.0, "taylor")


def dpmpp_2m_sde(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
                 sigmas: Sequence[float] | None = None, start: int = 0, order: int = 2,
                 algorithm: str = "sde-dpmsolver++", solver_type: str = "midpoint",
                 lower_order_final: bool = True, euler_at_final: bool = False, eta: float = 1.0) -> StepTable:
    """SDE-DPM-Solver++(2M), Lu et al. 2022 (DPM-Solver++), eq. 18; diffusers' DPMSolverMultistepScheduler
    with algorithm_type sde-dpmsolver++. Fresh noise every step.

    ``eta`` scales the noise (1 as in the paper, 0 gives dpmpp_2m): with z = (1 + eta) h,
    x' = (sigma' / sigma) exp(-eta h) x + alpha' (1 - exp(-z)) (D0 + D1 / 2)
         + sigma' sqrt(1 - exp(-2 eta h)) noise.
    """
    if algorithm not in ALGORITHMS[2:]:
        raise LdmfastError(f"dpmpp_2m_sde: algorithm={algorithm!r}, must be sde-dpmsolver++ or sde-dpmsolver")
    return _multistep("dpmpp_2m_sde", schedule, steps, timesteps, sigmas, start, order, algorithm,
                      solver_type, lower_order_final, euler_at_final, eta, "taylor")


def dpmpp_3m_sde(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
                 sigmas: Sequence[float] | None = None, start: int = 0, solver_type: str = "heun",
                 lower_order_final: bool = True, euler_at_final: bool = False, eta: float = 1.0,
                 third_order: str = "taylor") -> StepTable:
    """SDE-DPM-Solver++(3M): the data prediction is extrapolated by a parabola through the last three.

    With z = (1 + eta) h, phi2 = 1 - (1 - exp(-z)) / z, phi3 = phi2 / z - 1/2:
    x' = (sigma' / sigma) exp(-eta h) x + alpha' ((1 - exp(-z)) D0 + phi2 D1 - phi3 D2) + noise as in 2M SDE,
    with D1 and D2 the divided differences of DPM-Solver++ 3M. ``third_order`` "diffusers" has -1/2 where the
    expansion has +1/2 in the coefficient of D2 (diffusers 0.42 does; a folder's config selects it), so that
    D2 keeps a weight near -1 for small steps.
    """
    if third_order not in ("taylor", "diffusers"):
        raise LdmfastError(f"dpmpp_3m_sde: third_order={third_order!r}, must be taylor or diffusers")
    return _multistep("dpmpp_3m_sde", schedule, steps, timesteps, sigmas, start, 3, "sde-dpmsolver++",
                      solver_type, lower_order_final, euler_at_final, eta, third_order)


def _multistep(name: str, schedule: Schedule, steps: int | None, timesteps: Sequence[float] | None,
               sigmas: Sequence[float] | None, start: int, order: int, algorithm: str, solver_type: str,
               lower_order_final: bool, euler_at_final: bool, eta: float, third_order: str) -> StepTable:
    if order not in (1, 2, 3) or (algorithm == "sde-dpmsolver" and order == 3):
        raise LdmfastError(f"{name}: order={order} with {algorithm}, must be 1, 2 or 3 (sde-dpmsolver: "
                           "1 or 2)")
    if solver_type not in ("midpoint", "heun"):
        raise LdmfastError(f"{name}: solver_type={solver_type!r}, must be midpoint or heun")
    if eta < 0:
        raise LdmfastError(f"{name}: eta={eta}, must not be negative")
    grid = log_snr_levels(schedule, steps, timesteps, sigmas)
    data = algorithm.endswith("++")
    if not data and grid.sigmas[-1] == 0:
        raise LdmfastError(f"{name}: algorithm {algorithm} cannot end at sigma 0; use "
                           "final_sigmas_type='sigma_min'")
    level = Levels(schedule, grid.sigmas)
    n = len(grid.times)
    b = TableBuilder(name, schedule, registers=max(order - 1, 1), clips=schedule.thresholding)
    for i in range(start, n):
        x0, eps = b.predict(level.alpha[i], level.sigma[i])
        if b.clip and not data:
            eps = (b.x - level.alpha[i] * x0) / level.sigma[i]
        m = [x0 if data else eps, *b.r]
        this = min(order, level.distinct(start, i))
        short = lower_order_final and n < 15
        if level.lam[i + 1] == level.lam[i]:
            this = 1  # a repeated last sigma: an idle step, whose differences would be 0 / 0
        elif i == n - 1 and (euler_at_final or short or grid.sigmas[-1] == 0):
            this = 1
        elif i == n - 2 and short:
            this = min(this, 2)
        differences = _differences(level.lam, i, m, this)
        row = (_data_step(b, level, i, differences, solver_type, eta, third_order) if data else
               _noise_step(b, level, i, differences, solver_type, algorithm.startswith("sde")))
        b.stage(grid.times[i], row, dict(enumerate(m[:len(b.r)])))
    return b.table(grid.times[start:], level.pairs(start), 1.0, start)


def _differences(lam: Array, i: int, m: list[Array], order: int) -> list[Array]:
    """[D0, D1, D2][:order]: the last prediction and its scaled divided differences in lambda."""
    if order == 1:
        return m[:1]
    h = lam[i + 1] - lam[i]
    r0 = (lam[i] - lam[i - 1]) / h
    near = (m[0] - m[1]) / r0
    if order == 2:
        return [m[0], near]
    r1 = (lam[i - 1] - lam[i - 2]) / h
    far = (m[1] - m[2]) / r1
    return [m[0], near + r0 / (r0 + r1) * (near - far), (near - far) / (r0 + r1)]


def _data_step(b: TableBuilder, level: Levels, i: int, d: list[Array], solver_type: str, eta: float,
               third_order: str) -> Array:
    """Exponential integrator of the data prediction over h in lambda; z = (1 + eta) h."""
    h = level.lam[i + 1] - level.lam[i]
    z = (1 + eta) * h
    alpha, sigma = level.alpha[i + 1], level.sigma[i + 1]
    decay = math.exp(-eta * h) if eta else 1.0  # h is infinite when the run ends at sigma 0
    row = sigma / level.sigma[i] * decay * b.x - alpha * math.expm1(-z) * d[0]
    if eta:
        row = row + sigma * math.sqrt(-math.expm1(-2 * eta * h)) * b.noise
    if len(d) == 1:
        return row
    phi2 = math.expm1(-z) / z + 1
    if len(d) == 2 and solver_type == "midpoint":
        return row - 0.5 * alpha * math.expm1(-z) * d[1]
    row = row + alpha * phi2 * d[1]
    if len(d) == 3:
        phi3 = phi2 / z - 0.5 if third_order == "taylor" else phi2 / z + 0.5
        row = row - alpha * phi3 * d[2]
    return row


def _noise_step(b: TableBuilder, level: Levels, i: int, d: list[Array], solver_type: str, sde: bool) -> Array:
    """Exponential integrator of the noise prediction over h in lambda."""
    h = level.lam[i + 1] - level.lam[i]
    sigma = level.sigma[i + 1]
    twice = 2.0 if sde else 1.0
    row = level.alpha[i + 1] / level.alpha[i] * b.x - twice * sigma * math.expm1(h) * d[0]
    if sde:
        row = row + sigma * math.sqrt(math.expm1(2 * h)) * b.noise
    if len(d) == 1:
        return row
    if len(d) == 2 and solver_type == "midpoint":
        return row - twice * 0.5 * sigma * math.expm1(h) * d[1]
    row = row - twice * sigma * (math.expm1(h) / h - 1) * d[1]
    if len(d) == 3:
        row = row - sigma * ((math.expm1(h) - h) / h**2 - 0.5) * d[2]
    return row
