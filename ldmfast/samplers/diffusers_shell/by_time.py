"""DDIM, DDPM and PNDM: a step is known from its timestep, whatever came before in the list."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..ddim import ddim_on
from ..ddpm import ddpm_on
from ..pndm import RUNGE_KUTTA, WEIGHTS, transfer
from ..spacing import one_step_grid
from ..step_table import StepTable
from .base import SchedulerError, TableScheduler, combine, draw, parents, shell


class _ByTime(TableScheduler):
    def _begin_run(self, given: dict[str, Any]) -> None:
        self._schedule()

    def _one_step(self, make: Any, *step: Any, options: tuple) -> StepTable:
        schedule = self._schedule()
        return self._kept((*step, *options), lambda: make(schedule, one_step_grid(schedule, *step), 0, *options))

    def _stride(self) -> int:
        if self.num_inference_steps is None:
            raise SchedulerError(f"{self._parent.__name__}: the number of steps is not known; call set_timesteps first")
        return self.config.num_train_timesteps // self.num_inference_steps


@shell
class DDIMScheduler(_ByTime, parents.DDIMScheduler):
    """diffusers' DDIMScheduler over ``ldmfast.samplers.ddim``."""

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, eta: float = 0.0,
             use_clipped_model_output: bool = False, generator: Any = None, variance_noise: Tensor | None = None,
             return_dict: bool = True) -> DDIMSchedulerOutput | tuple:
        """From ``timestep`` to num_train_timesteps // steps below it. Tensors of one shape, floating."""
        if eta > 0 and variance_noise is not None and generator is not None:
            raise SchedulerError("DDIMScheduler.step: both generator and variance_noise are given; give one")
        time = int(timestep)
        end = time - self._stride()
        table = self._one_step(ddim_on, time, end, float(self.final_alpha_cumprod),
                               options=(eta, use_clipped_model_output))
        noise = (draw(model_output, generator) if variance_noise is None else variance_noise) if eta > 0 else None
        prev, _, x0 = self._advance(table, 0, sample, model_output, noise=noise)
        return self._finish(DDIMSchedulerOutput, return_dict, sample, model_output, prev, x0)


@shell
class DDPMScheduler(_ByTime, parents.DDPMScheduler):
    """diffusers' DDPMScheduler over ``ldmfast.samplers.ddpm``; learned variances are refused."""

    def _settings(self) -> dict[str, Any]:
        settings = super()._settings()
        # a name that diffusers does not know either means fixed_small to it
        known = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
        if settings.get("variance_type") not in known:
            settings["variance_type"] = "fixed_small"
        return settings

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, generator: Any = None,
             return_dict: bool = True) -> DDPMSchedulerOutput | tuple:
        """From ``timestep`` to the next in the list, or one below it where no list was set."""
        time = int(timestep)
        try:
            end = int(self.previous_timestep(timestep))
        except IndexError as error:
            raise SchedulerError(f"DDPMScheduler.step: timestep {time} is not one of scheduler.timesteps") from error
        table = self._one_step(ddpm_on, time, end, 1.0, options=(self._schedule().options["variance_type"], np.float32))
        noise = draw(model_output, generator) if time > 0 else None
        prev, _, x0 = self._advance(table, 0, sample, model_output, noise=noise)
        return self._finish(DDPMSchedulerOutput, return_dict, sample, model_output, prev, x0)


@shell
class PNDMScheduler(_ByTime, parents.PNDMScheduler):
    """diffusers' PNDMScheduler over the transfer and the weights of ``ldmfast.samplers.pndm``. Started late
    (image to image) it skips a transition, as diffusers does; ``make_table`` does not."""

    ets: list[Tensor]
    cur_sample: Tensor | None
    cur_model_output: Any
    _has_x0 = False

    def step(self, model_output: Tensor, timestep: int, sample: Tensor,
             return_dict: bool = True) -> SchedulerOutput | tuple:
        """``step_prk`` or ``step_plms``, as ``counter`` and skip_prk_steps say."""
        self._stride()  # before set_timesteps there is no list to count in
        return super().step(model_output, timestep, sample, return_dict)

    def step_prk(self, model_output: Tensor, timestep: int, sample: Tensor,
                 return_dict: bool = True) -> SchedulerOutput | tuple:
        """A quarter of a pseudo Runge-Kutta step; ``counter`` says which."""
        half = self._stride() // 2
        end = int(timestep) - (0 if self.counter % 2 else half)
        time = int(self.prk_timesteps[self.counter // 4 * 4])
        part = self.counter % 4
        if part == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        outputs, weights = [model_output], [1.0]
        total = RUNGE_KUTTA[part] * model_output + self.cur_model_output
        if part == 3:
            outputs, self.cur_model_output = [total], 0
        else:
            self.cur_model_output = total
        base = sample if self.cur_sample is None else self.cur_sample
        return self._transfer(base, outputs, weights, time, end, return_dict)

    def step_plms(self, model_output: Tensor, timestep: int, sample: Tensor,
                  return_dict: bool = True) -> SchedulerOutput | tuple:
        """A linear multistep; the first is evaluated twice, at ``counter`` 0 and 1."""
        stride = self._stride()
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise SchedulerError(f"PNDMScheduler.step_plms: {len(self.ets)} earlier outputs, needs 3; run "
                                 "prk_timesteps first, or set skip_prk_steps=True")
        time, end = int(timestep), int(timestep) - stride
        base: Any = sample
        if self.counter != 1:
            self.ets = [*self.ets[-3:], model_output]
        else:
            time, end = time + stride, time
        outputs = self.ets[:-5:-1]
        weights = WEIGHTS[len(outputs)]
        if self.counter == 0 and len(self.ets) == 1:
            self.cur_sample = sample
        elif self.counter == 1 and len(self.ets) == 1:
            outputs, weights = [model_output, self.ets[-1]], (0.5, 0.5)
            base, self.cur_sample = self.cur_sample, None
        return self._transfer(base, outputs, weights, time, end, return_dict)

    def _transfer(self, base: Tensor, outputs: list[Tensor], weights: Any, time: int, end: int,
                  return_dict: bool) -> SchedulerOutput | tuple:
        x, slope = np.eye(1 + len(outputs))[0], np.array([0.0, *weights])
        wide = base if base.dtype == torch.float64 else base.float()
        prev = combine(transfer(self._schedule(), x, slope, time, end), [wide, *outputs])
        self.counter += 1
        return self._finish(SchedulerOutput, return_dict, base, outputs[0], prev)
