"""Euler, ancestral Euler, LCM, TCD and flow Euler: one evaluation a step, no memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from ..registry import make_table
from ..step_table import StepTable
from .base import SchedulerError, TableScheduler, combine, draw, floats, parents, refuse_integer, shell


class _Euler(TableScheduler):
    _needs_run = False

    def _at(self, stage: int, **options: Any) -> tuple[StepTable, int]:
        """(table, stage in it). Before ``set_timesteps`` the scheduler stands on the training sigmas, as diffusers'
        does; they need not fall (zero terminal SNR), so each step has its own table there."""
        if self._run is not None or options:
            return self._table(**options), stage
        schedule = self._schedule()
        return self._kept(("training", stage), lambda: make_table(
            schedule, None, sigmas=floats(self.sigmas[stage:stage + 2]))), 0


@shell
class EulerDiscreteScheduler(_Euler, parents.EulerDiscreteScheduler):
    """diffusers' EulerDiscreteScheduler over ``ldmfast.samplers.euler``."""

    _output_like_model = True

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, s_churn: float = 0.0,
             s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Any = None,
             return_dict: bool = True) -> EulerDiscreteSchedulerOutput | tuple:
        """One step in sigma space; ``sample`` is the unscaled state, of any floating dtype."""
        refuse_integer(timestep, "EulerDiscreteScheduler")
        stage = self._stage(timestep)
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise} if s_churn else {}
        table, row = self._at(stage, **churn)
        noise = draw(model_output, generator) if table.needs_noise[row] else None
        prev, _, x0 = self._advance(table, row, sample, model_output, noise=noise)
        self._step_index += 1
        return self._finish(EulerDiscreteSchedulerOutput, return_dict, sample, model_output, prev, x0)


@shell
class EulerAncestralDiscreteScheduler(_Euler, parents.EulerAncestralDiscreteScheduler):
    """diffusers' EulerAncestralDiscreteScheduler over ``ldmfast.samplers.euler_a``."""

    _output_like_model = True

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, generator: Any = None,
             return_dict: bool = True) -> EulerAncestralDiscreteSchedulerOutput | tuple:
        """One step; noise is drawn in every one, also in the last, which does not use it."""
        refuse_integer(timestep, "EulerAncestralDiscreteScheduler")
        stage = self._stage(timestep)
        table, row = self._at(stage)
        prev, _, x0 = self._advance(table, row, sample, model_output, noise=draw(model_output, generator))
        self._step_index += 1
        return self._finish(EulerAncestralDiscreteSchedulerOutput, return_dict, sample, model_output, prev, x0)


class _Consistency(TableScheduler):
    """A step knows the next time of diffusers' list and nothing else: its table is made when it is reached."""

    _step_index: int

    def _begin_run(self, given: dict[str, Any]) -> None:
        self._run, self._levels = {}, (self.timesteps, None)

    def _jump(self, timestep: Any, sample: Tensor, model_output: Tensor, generator: Any, **options: Any
              ) -> tuple[Tensor, Tensor]:
        """The state at the next time, and where the step was before it was noised to there."""
        stage = self._stage(timestep)
        schedule = self._schedule()
        times = tuple(self.timesteps[stage:stage + 2].tolist())
        table = self._kept((times, *options.items()), lambda: make_table(schedule, None, timesteps=times, **options))
        noise = draw(model_output, generator) if table.needs_noise[0] else None
        prev, _, _ = self._advance(table, 0, sample, model_output, noise=noise)
        self._step_index += 1
        if noise is None:
            return prev, prev
        # x' = a jump + s noise, a^2 + s^2 = 1
        s = float(table.matrices[0, 0, table.columns.index("noise")])
        return prev, combine(np.array([1.0, -s]) / np.sqrt(1 - s**2), [prev, noise])


@shell
class LCMScheduler(_Consistency, parents.LCMScheduler):
    """diffusers' LCMScheduler over ``ldmfast.samplers.lcm``."""

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, generator: Any = None,
             return_dict: bool = True) -> LCMSchedulerOutput | tuple:
        """The predicted picture (``denoised``), noised to the next time of the list; the last is not."""
        prev, denoised = self._jump(timestep, sample, model_output, generator)
        return self._finish(LCMSchedulerOutput, return_dict, sample, model_output, prev, denoised, "denoised")


@shell
class TCDScheduler(_Consistency, parents.TCDScheduler):
    """diffusers' TCDScheduler over ``ldmfast.samplers.tcd``."""

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, eta: float = 0.3, generator: Any = None,
             return_dict: bool = True) -> TCDSchedulerOutput | tuple:
        """A jump along the trajectory (``pred_noised_sample``), noised to the next time; ``eta`` is TCD's gamma."""
        prev, jumped = self._jump(timestep, sample, model_output, generator, eta=eta)
        return self._finish(TCDSchedulerOutput, return_dict, sample, model_output, prev, jumped, "pred_noised_sample")


@shell
class FlowMatchEulerDiscreteScheduler(TableScheduler, parents.FlowMatchEulerDiscreteScheduler):
    """diffusers' FlowMatchEulerDiscreteScheduler over ``ldmfast.samplers.flow_euler``."""

    _has_x0 = False
    _output_like_model = True

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"shift": self.shift}  # set_shift changes it without the config

    def set_shift(self, shift: float) -> None:
        """The shift of the next ``set_timesteps``."""
        super().set_shift(shift)
        self._held = None

    def _lists(self, given: dict[str, Any]) -> dict[str, Any]:
        lists = super()._lists(given)
        if lists["sigmas"] is not None:
            lists["timesteps"] = None  # given too, they are what the network sees and no business of a step
        elif lists["timesteps"] is None:
            # the ends stay those of the constructor's shift when set_shift has changed it
            lists |= {"steps": None, "sigmas": np.linspace(self.sigma_max, self.sigma_min, lists["steps"]).tolist()}
        return lists

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, s_churn: float = 0.0,
             s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Any = None,
             per_token_timesteps: Tensor | None = None,
             return_dict: bool = True) -> FlowMatchEulerDiscreteSchedulerOutput | tuple:
        """One step along the flow. The churn arguments change nothing, as in diffusers; times that differ from
        token to token are refused."""
        refuse_integer(timestep, "FlowMatchEulerDiscreteScheduler")
        if per_token_timesteps is not None:
            raise SchedulerError("FlowMatchEulerDiscreteScheduler.step: per_token_timesteps has no step table; use "
                                 "diffusers' own class")
        stage = self._stage(timestep)
        noise = draw(sample, generator) if self.config.stochastic_sampling else None
        prev, _, _ = self._advance(self._table(), stage, sample, model_output, noise=noise)
        self._step_index += 1
        return self._finish(FlowMatchEulerDiscreteSchedulerOutput, return_dict, sample, model_output, prev)
