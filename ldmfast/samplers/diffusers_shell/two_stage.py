"""Heun, DPM2, ancestral DPM2 and flow Heun: two evaluations a step, the state between them kept here."""

from __future__ import annotations

from typing import Any

from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteSchedulerOutput
from torch import Tensor

from ..step_table import StepTable
from .base import SchedulerError, TableScheduler, draw, parents, refuse_integer, shell


class _TwoStage(TableScheduler):
    """``sample`` holds the state at the start of a step under way, as in diffusers."""

    sample: Tensor | None
    _step_index: int

    def _half(self, timestep: Any) -> tuple[StepTable, int, bool]:
        """(table, stage, whether it is the first evaluation of its step)."""
        stage = self._stage(timestep)
        table = self._table()
        first = stage == 0 or bool(table.step_end[stage - 1])
        if first is not self.state_in_first_order:
            which = "first" if first else "second"
            raise SchedulerError(f"{self._parent.__name__}: index {stage} is the {which} evaluation of its step, but "
                                 "the scheduler stands before the other; begin at an even index, after set_timesteps")
        return table, stage, first

    def _two_stage(self, timestep: Any, sample: Tensor, model_output: Tensor, *, generator: Any = None,
                   stochastic: bool = False) -> tuple[Tensor, Tensor | None]:
        table, stage, first = self._half(timestep)
        noise = draw(model_output, generator) if stochastic and not first else None
        prev, registers, x0 = self._advance(table, stage, sample, model_output, self._registers(), noise)
        self._keep(registers if first and not table.step_end[stage] else None, stage)
        self._step_index += 1
        return prev, x0

    def _registers(self) -> list[Tensor | None]:
        return [self.sample]

    def _keep(self, registers: list[Tensor] | None, stage: int) -> None:
        self.sample = registers[0] if registers else None


class _Heun(_TwoStage):
    sample = None  # the flow class has none before its first step
    prev_derivative: Tensor | None

    def _registers(self) -> list[Tensor | None]:
        return [self.sample, self.prev_derivative]

    def _keep(self, registers: list[Tensor] | None, stage: int) -> None:
        self.sample, self.prev_derivative = registers if registers else (None, None)
        sigmas = self.sigmas
        self.dt = sigmas[stage + 1] - sigmas[stage] if registers else None


@shell
class HeunDiscreteScheduler(_Heun, parents.HeunDiscreteScheduler):
    """diffusers' HeunDiscreteScheduler over ``ldmfast.samplers.heun``."""

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor,
             return_dict: bool = True) -> HeunDiscreteSchedulerOutput | tuple:
        """One evaluation: the Euler half, then the mean of the slopes at both ends."""
        prev, x0 = self._two_stage(timestep, sample, model_output)
        return self._finish(HeunDiscreteSchedulerOutput, return_dict, sample, model_output, prev, x0)


@shell
class KDPM2DiscreteScheduler(_TwoStage, parents.KDPM2DiscreteScheduler):
    """diffusers' KDPM2DiscreteScheduler over ``ldmfast.samplers.dpm2``."""

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor,
             return_dict: bool = True) -> KDPM2DiscreteSchedulerOutput | tuple:
        """One evaluation: to the middle sigma, then over the whole step with the slope there."""
        prev, x0 = self._two_stage(timestep, sample, model_output)
        return self._finish(KDPM2DiscreteSchedulerOutput, return_dict, sample, model_output, prev, x0)


@shell
class KDPM2AncestralDiscreteScheduler(_TwoStage, parents.KDPM2AncestralDiscreteScheduler):
    """diffusers' KDPM2AncestralDiscreteScheduler over ``ldmfast.samplers.dpm2_a``."""

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, generator: Any = None,
             return_dict: bool = True) -> KDPM2AncestralDiscreteSchedulerOutput | tuple:
        """One evaluation; the second of a step draws noise."""
        prev, x0 = self._two_stage(timestep, sample, model_output, generator=generator, stochastic=True)
        return self._finish(KDPM2AncestralDiscreteSchedulerOutput, return_dict, sample, model_output, prev, x0)


@shell
class FlowMatchHeunDiscreteScheduler(_Heun, parents.FlowMatchHeunDiscreteScheduler):
    """diffusers' FlowMatchHeunDiscreteScheduler over ``ldmfast.samplers.flow_heun``."""

    _has_x0 = False
    _output_like_model = True

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, s_churn: float = 0.0,
             s_tmin: float = 0.0, s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Any = None,
             return_dict: bool = True) -> FlowMatchHeunDiscreteSchedulerOutput | tuple:
        """One evaluation. Churn (``s_churn`` above 0) is refused."""
        refuse_integer(timestep, "FlowMatchHeunDiscreteScheduler")
        if s_churn:
            raise SchedulerError(f"FlowMatchHeunDiscreteScheduler.step: s_churn={s_churn} has no step table; use 0, or "
                                 "diffusers' own class")
        prev, _ = self._two_stage(timestep, sample, model_output)
        return self._finish(FlowMatchHeunDiscreteSchedulerOutput, return_dict, sample, model_output, prev)
