"""Step tables: a whole sampling run as float64 coefficients, made before the loop.

A stage is one network evaluation. With the state S = [x, registers...], stage i computes

    S_new = matrices[i] @ [x, predictions..., noise, (x0), registers...]

from network output at (c_in[i] * x, network_times[i]). Solvers build tables; ``sample`` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..errors import LdmfastError, ShapeError
from .schedules import Array, Schedule
from .spacing import sigma_to_time


@dataclass(frozen=True)
class Clip:
    """The one thing in a step that is not linear: limits on the predicted x0.

    ``limit`` clamps to [-limit, limit] (diffusers' clip_sample). Otherwise dynamic thresholding (Saharia et
    al. 2022, section 2.3): s = the ``ratio`` quantile of |x0| a picture, at least 1, at most max_value;
    x0 = clamp(x0, -s, s) / s.
    """

    limit: float | None = None
    ratio: float = 0.995
    max_value: float = 1.0

    def __call__(self, x0: Tensor) -> Tensor:
        if self.limit is not None:
            return x0.clamp(-self.limit, self.limit)
        flat = x0.reshape(x0.shape[0], -1)
        flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        s = torch.quantile(flat.abs(), self.ratio, dim=1).clamp(min=1, max=self.max_value)
        s = s.reshape(-1, *[1] * (x0.ndim - 1)).to(flat.dtype)
        return (torch.clamp(x0.to(flat.dtype), -s, s) / s).to(x0.dtype)


Adapt = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""(the columns of a stage, "x0" and the registers among them) -> those that it adds."""


@dataclass(frozen=True, eq=False)
class StepTable:
    """Coefficients of a run. All arrays are read-only; the properties count stages, steps and registers.

    columns: names of the inputs of a stage: "x", the predictions ("e", or "uncond" and "cond" once guided),
    "noise", "x0" (only with ``clip``: the limited data prediction, made from ``x0_rows``; or with ``adapts``, whose
    columns follow it), "r0", "r1", ...
    matrices: (stages, 1 + registers, columns) float64. network_times, c_in: (stages,) float64.
    x0_rows: (stages, columns) float64, the predicted picture before ``clip`` (zeros where a solver has none).
    step_index: (stages,) which step a stage belongs to, counted from 0 at the start of the run.
    timesteps: (steps,) the solver's own time at the start of each step.
    noise_levels: (steps + 1, 2): x_t = a * x0 + s * noise at the boundary before each step; the last row is
    (1, 0), because what the loop hands on is a picture, whatever noise the schedule thinks is left.
    init_noise_sigma: factor on unit noise for a run from pure noise. start: steps skipped (image to image).
    solver_times: (stages,) the network times of the solver itself, where the network is told others.
    adapts: empty, or for each stage what makes the columns that are no linear function of the others (``Adapt``).
    """

    solver: str
    columns: tuple[str, ...]
    matrices: Array
    network_times: Array
    c_in: Array
    step_index: np.ndarray
    timesteps: Array
    noise_levels: Array
    init_noise_sigma: float
    x0_rows: Array
    start: int = 0
    predictions: tuple[str, ...] = ("e",)
    clip: Clip | None = None
    solver_times: Array | None = None
    adapts: tuple[Adapt, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether nothing is clipped or adapted."""
        return self.clip is None and not self.adapts

    @property
    def num_stages(self) -> int:
        return len(self.network_times)

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def num_registers(self) -> int:
        return self.matrices.shape[1] - 1

    @cached_property
    def step_end(self) -> np.ndarray:
        """(stages,) bool: the stage after which x is at the next step boundary."""
        return np.append(self.step_index[1:] != self.step_index[:-1], True)[:self.num_stages]

    @cached_property
    def needs_noise(self) -> np.ndarray:
        """(stages,) bool: the stage reads fresh noise."""
        return self._reads("noise")

    @cached_property
    def needs_prediction(self) -> np.ndarray:
        """(stages, predictions) bool: which network outputs the stage reads (guidance scale 1 reads one)."""
        return np.stack([self._reads(name) for name in self.predictions], axis=1)

    def _reads(self, name: str) -> np.ndarray:
        column = self.columns.index(name)
        reads = (self.matrices[:, :, column] != 0).any(axis=1)
        return reads if self.linear else reads | (self.x0_rows[:, column] != 0)

    def with_guidance(self, scale: float | Sequence[float]) -> StepTable:
        """This table with classifier-free guidance folded in (Ho & Salimans 2022, eq. 6).

        e = uncond + w (cond - uncond) is linear, so the column e becomes (1 - w) uncond and w cond. ``scale``
        is one number, or one for each stage. Where w is 1 the unconditional output is not read
        (``needs_prediction``); if it is 1 everywhere the table stays as it is. Raises LdmfastError for a
        table that is guided already, a wrong length, or a scale that is not finite.
        """
        w = self._per_stage(scale, "guidance")
        if not np.isfinite(w).all():
            raise LdmfastError(f"guidance: scale {w[~np.isfinite(w)][0]} is not finite")
        if (w == 1).all():
            return self
        return self.with_predictions(np.stack([1 - w, w], axis=1), ("uncond", "cond"))

    def with_predictions(self, weights: Array, names: tuple[str, ...]) -> StepTable:
        """This table reading several network outputs in place of one: e = sum_k weights[stage, k] * names[k].

        One name and weights other than 1 rescale the output (epsilon scaling); several compose denoisers.
        """
        weights = np.asarray(weights, dtype=np.float64)
        if self.predictions != ("e",):
            raise LdmfastError(f"step table: already reads {', '.join(self.predictions)}; fold once only")
        if weights.shape != (self.num_stages, len(names)):
            raise ShapeError(f"step table: weights have shape {weights.shape}, need "
                             f"({self.num_stages} stages, {len(names)} outputs)")
        at = self.columns.index("e")

        def split(rows: Array, w: Array) -> Array:
            parts = [rows[..., at:at + 1] * w[..., k:k + 1] for k in range(len(names))]
            return _frozen(np.concatenate([rows[..., :at], *parts, rows[..., at + 1:]], axis=-1))

        return replace(
            self, columns=(*self.columns[:at], *names, *self.columns[at + 1:]), predictions=names,
            matrices=split(self.matrices, weights[:, None, :]),
            x0_rows=split(self.x0_rows, weights))

    def with_network_times(self, times: Sequence[float] | Callable[[float], float]) -> StepTable:
        """This table with other times shown to the network: one a stage, or one a step for all its stages; or a
        function of the times that it would be shown, such as ``time_buckets``."""
        if callable(times):
            times = [times(float(t)) for t in self.network_times]
        values = np.asarray(times, dtype=np.float64)
        if values.shape == (self.num_steps,):
            values = values[self.step_index]
        values = self._per_stage(values, "network_times")
        if not np.isfinite(values).all():
            raise LdmfastError(f"network_times: {values[~np.isfinite(values)][0]} is not finite")
        own = self.network_times if self.solver_times is None else self.solver_times
        return replace(self, network_times=_frozen(values), solver_times=own)

    def add_noise(self, source: Tensor, noise: Tensor, boundary: int = 0) -> Tensor:
        """a * source + s * noise at a step boundary: 0 is the start of the run, ``num_steps`` its end."""
        from .. import ops
        if not 0 <= boundary <= self.num_steps:
            raise LdmfastError(f"add_noise: boundary {boundary} is not in 0..{self.num_steps}")
        row = torch.tensor(self.noise_levels[boundary:boundary + 1], device=source.device)
        return ops.lincomb(row, 0, [source, noise])

    def _per_stage(self, value: float | Sequence[float] | Array, what: str) -> Array:
        values = np.asarray(value, dtype=np.float64)
        if values.ndim == 0:
            return np.full(self.num_stages, float(values))
        if values.shape != (self.num_stages,):
            raise LdmfastError(f"{what}: {values.size} values for {self.num_stages} stages "
                               f"({self.num_steps} steps of {self.solver}); give one for each stage")
        return values


def _frozen(values: Array) -> Array:
    values = np.ascontiguousarray(values)
    values.flags.writeable = False
    return values


class TableBuilder:
    """Writes a table down stage by stage. Every quantity is a row vector over the columns, so a solver's
    formulas read like the paper's: ``x0, eps = b.predict(...)``; ``b.stage(t, a * x0 + s * eps)``."""

    def __init__(self, solver: str, schedule: Schedule, registers: int = 0, clips: bool = False,
                 adapts: Sequence[str] = ()) -> None:
        self.clip: Clip | None = None
        if clips and schedule.thresholding:
            self.clip = Clip(None, schedule.dynamic_thresholding_ratio, schedule.sample_max_value)
        elif clips and schedule.clip_sample:
            self.clip = Clip(schedule.clip_sample_range)
        elif schedule.thresholding or schedule.clip_sample:
            option = "thresholding" if schedule.thresholding else "clip_sample"
            raise LdmfastError(f"{solver}: {option}=True is not supported by this solver; use ddim, "
                               "or switch it off")
        self.solver, self.prediction_type, self._schedule = solver, schedule.prediction_type, schedule
        made = ["x0", *adapts] if self.clip or adapts else []
        names = ["x", "e", "noise", *made, *(f"r{i}" for i in range(registers))]
        unit = dict(zip(names, np.eye(len(names))))
        self.columns = tuple(names)
        self.x, self.e, self.noise = unit["x"], unit["e"], unit["noise"]
        self.r = [unit[f"r{i}"] for i in range(registers)]
        self.adapted = {name: unit[name] for name in made}
        self._clipped = unit["x0"] if self.clip else None
        self._adapts: list[Adapt] = []
        self._x0_row = np.zeros(len(names))
        self._rows: list[Array] = []
        self._x0_rows: list[Array] = []
        self._times: list[float] = []
        self._c_in: list[float] = []
        self._steps: list[int] = []
        self._step = 0

    def predict(self, alpha: float, sigma: float, x: Array | None = None) -> tuple[Array, Array]:
        """(x0, eps) as the network output tells them at a state x = alpha * x0 + sigma * eps.

        The only place that knows the parametrisations: epsilon (Ho et al. 2020), sample, v = alpha eps -
        sigma x0 at alpha^2 + sigma^2 = 1 (Salimans & Ho 2022, appendix D; other states are scaled there
        first), and flow = eps - x0 at alpha + sigma = 1 (Liu et al. 2022). x0 is the clipped column where the
        solver clips; eps never is. Where the schedule scales it, eps is eps / lambda and x0 follows from it (Ning et
        al. 2024, "Elucidating the Exposure Bias in Diffusion Models", equation 13).
        """
        x = self.x if x is None else x
        if self.prediction_type == "epsilon":
            if alpha == 0:
                raise LdmfastError("epsilon prediction says nothing about the picture at zero terminal SNR; "
                                   "use v_prediction or sample, or rescale_betas_zero_snr=False")
            x0, eps = (x - sigma * self.e) / alpha, self.e
        elif self.prediction_type == "sample":
            x0, eps = self.e, (x - alpha * self.e) / sigma
        elif self.prediction_type == "v_prediction":
            s = np.hypot(alpha, sigma)
            x0 = alpha / s * (x / s) - sigma / s * self.e
            eps = alpha / s * self.e + sigma / s * (x / s)
        else:
            x0, eps = x - sigma * self.e, x + alpha * self.e
        scale = self._epsilon_scale(alpha, sigma)
        if scale != 1:
            eps = eps / scale
            x0 = (x - sigma * eps) / alpha
        self._x0_row = x0
        return (x0 if self._clipped is None else self._clipped), eps

    def _epsilon_scale(self, alpha: float, sigma: float) -> float:
        constant, slope = self._schedule.epsilon_scale
        if (constant, slope) == (1.0, 0.0):
            return 1.0
        if alpha == 0:
            raise LdmfastError(f"{self.solver}: epsilon_scale has no meaning at zero terminal SNR; leave it out")
        if self._schedule.flow:
            return constant + slope * sigma
        time = sigma_to_time(np.array([sigma / alpha]), self._schedule)[0]
        return float(constant + slope * time / self._schedule.num_train_timesteps)

    def stage(self, time: float, x: Array, registers: dict[int, Array] | None = None, *, c_in: float = 1.0,
              end: bool = True, adapt: Adapt | None = None) -> None:
        """One network evaluation at ``time``; x and the registers named become these rows, others stay."""
        rows = [x, *self.r]
        for k, row in (registers or {}).items():
            rows[1 + k] = row
        self._rows.append(np.stack(rows))
        self._x0_rows.append(self._x0_row)
        self._x0_row = np.zeros_like(self.x)
        self._times.append(float(time))
        self._c_in.append(float(c_in))
        self._steps.append(self._step)
        self._step += end
        if adapt is not None:
            self._adapts.append(adapt)

    def table(self, timesteps: Array, noise_levels: list[tuple[float, float]], init_noise_sigma: float,
              start: int) -> StepTable:
        """The finished table; noise_levels at the start of each step run, the end (1, 0) is added."""
        n = len(self.columns)
        matrices = np.stack(self._rows) if self._rows else np.zeros((0, 1 + len(self.r), n))
        levels = np.array([*noise_levels, (1.0, 0.0)], dtype=np.float64)
        if not np.isfinite(matrices).all():
            stage = int(np.argwhere(~np.isfinite(matrices))[0][0])
            raise LdmfastError(f"{self.solver}: stage {stage} (network time {self._times[stage]:g}) has a "
                               "coefficient that is not finite; the schedule does not suit this solver")
        return StepTable(
            solver=self.solver, columns=self.columns, matrices=_frozen(matrices),
            network_times=_frozen(np.array(self._times)), c_in=_frozen(np.array(self._c_in)),
            step_index=np.array(self._steps, dtype=np.int64),
            timesteps=_frozen(np.array(timesteps, dtype=np.float64)), noise_levels=_frozen(levels),
            init_noise_sigma=float(init_noise_sigma), start=start, clip=self.clip,
            x0_rows=_frozen(np.array(self._x0_rows).reshape(-1, n)), adapts=tuple(self._adapts))
