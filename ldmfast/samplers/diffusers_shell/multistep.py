"""LMS, DPM-Solver, DEIS and UniPC: the earlier predictions stand in diffusers' own lists, newest last."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from .base import TableScheduler, draw, parents, shell


@shell
class LMSDiscreteScheduler(TableScheduler, parents.LMSDiscreteScheduler):
    """diffusers' LMSDiscreteScheduler over ``ldmfast.samplers.lms``. Started late (image to image) it uses the
    weights of slopes it does not have, as diffusers does; ``make_table`` does not."""

    derivatives: list[Tensor]

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4,
             return_dict: bool = True) -> LMSDiscreteSchedulerOutput | tuple:
        """One step with the last ``order`` slopes."""
        stage = self._stage(timestep)
        table = self._table() if order == 4 else self._table(order=order)
        older: list[Tensor | None] = [*self.derivatives[::-1], *[None] * table.num_registers]
        prev, slopes, x0 = self._advance(table, stage, sample, model_output, older[:table.num_registers])
        self.derivatives = [*self.derivatives, slopes[0]][-order:]
        self._step_index += 1
        return self._finish(LMSDiscreteSchedulerOutput, return_dict, sample, model_output, prev, x0)


class _Multistep(TableScheduler):
    model_outputs: list[Any]
    lower_order_nums: int
    _step_index: int
    _has_x0 = False
    _start = 0

    def _begin_run(self, given: dict[str, Any]) -> None:
        self._start = 0
        super()._begin_run(given)

    def _started(self, stage: int) -> int:
        """The start of the table in which this stage knows as many predictions as the scheduler has."""
        order = self.config.solver_order
        known = min(order, self.lower_order_nums + 1)
        if min(order, stage - self._start + 1) != known:
            self._start = max(0, stage - known + 1)
        return self._start

    def _multistep(self, stage: int, sample: Tensor, model_output: Tensor, noise: Tensor | None = None,
                   **options: Any) -> tuple[Tensor, list[Tensor]]:
        start = self._started(stage)
        table = self._table(start, **options)
        prev, new, _ = self._advance(table, stage - start, sample, model_output, self._registers(table.num_registers),
                                     noise)
        self.lower_order_nums = min(self.lower_order_nums + 1,
                                    self.config.solver_order)
        self._step_index += 1
        return prev, new

    def _registers(self, count: int) -> list[Tensor | None]:
        return self.model_outputs[::-1][:count]

    def _remember(self, prediction: Tensor, dtype: torch.dtype) -> None:
        self.model_outputs = [*self.model_outputs[1:], prediction.to(dtype)]


@shell
class DPMSolverMultistepScheduler(_Multistep, parents.DPMSolverMultistepScheduler):
    """diffusers' DPMSolverMultistepScheduler over ``ldmfast.samplers.dpmpp_2m`` and its SDE forms."""

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"variance_type": None}

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Any = None,
             variance_noise: Tensor | None = None, return_dict: bool = True) -> SchedulerOutput | tuple:
        """One step; the SDE algorithms draw noise, in fp32, in every one, unless ``variance_noise`` is given."""
        stage = self._stage(timestep)
        if self.config.variance_type in ("learned", "learned_range") and self.config.prediction_type == "epsilon":
            model_output = model_output[:, :3]  # a pixel model's learned variance, which this solver ignores
        noise = None
        if self.config.algorithm_type.startswith("sde-"):
            noise = draw(model_output, generator, torch.float32) if variance_noise is None else variance_noise.to(
                device=model_output.device, dtype=torch.float32)
        prev, new = self._multistep(stage, sample, model_output, noise)
        self._remember(new[0], self._dtype(sample, model_output))
        return self._finish(SchedulerOutput, return_dict, sample, model_output, prev)


@shell
class DEISMultistepScheduler(_Multistep, parents.DEISMultistepScheduler):
    """diffusers' DEISMultistepScheduler over ``ldmfast.samplers.deis``."""

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor,
             return_dict: bool = True) -> SchedulerOutput | tuple:
        """One step."""
        prev, new = self._multistep(self._stage(timestep), sample, model_output)
        self._remember(new[0], self._dtype(sample, model_output))
        return self._finish(SchedulerOutput, return_dict, sample, model_output, prev)


@shell
class UniPCMultistepScheduler(_Multistep, parents.UniPCMultistepScheduler):
    """diffusers' UniPCMultistepScheduler over ``ldmfast.samplers.unipc``."""

    def _started(self, stage: int) -> int:
        if self.last_sample is None:  # nothing to correct: the run begins here
            self._start = stage
        return super()._started(stage)

    def _registers(self, count: int) -> list[Tensor | None]:
        return [self.last_sample, *super()._registers(count - 1)]

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor,
             return_dict: bool = True) -> SchedulerOutput | tuple:
        """The corrector of the step before and the predictor of this one."""
        # the attribute may have been changed since construction
        changed = list(self.disable_corrector) != list(self.config.disable_corrector)
        options: dict[str, Any] = {"disable_corrector": tuple(self.disable_corrector)} if changed else {}
        prev, new = self._multistep(self._stage(timestep), sample, model_output, **options)
        dtype = self._dtype(sample, model_output)
        self.last_sample = new[0].to(dtype)
        self._remember(new[1], dtype)
        return self._finish(SchedulerOutput, return_dict, sample, model_output, prev)
