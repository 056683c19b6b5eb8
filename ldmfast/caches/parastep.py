"""ParaStep: several steps at once, each from latents that stale predictions have brought there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..samplers.sample import (
    Generators,
    Stage,
    StepCallback,
    StopSampling,
    advance,
    compile_table,
    noise_source,
    predict,
    report,
)
from ..samplers.step_table import StepTable
from .policy import Call, Policy, check_whole


@dataclass(frozen=True, kw_only=True)
class ParaStep(Policy):
    """Reuse-then-predict (Wang et al. 2025, "Communication-Efficient Diffusion Denoising Parallelization via
    Reuse-then-Predict Mechanism"): after ``warmup`` evaluations, rounds of ``ranks`` steps. Every rank of a round
    brings the latents to its own step with the newest prediction before the round, evaluates the network there, and
    the round's steps are then taken with these predictions. So the evaluations of a round do not wait for each other:
    of N, warmup + ceil((N - warmup) / ranks) come one after another (``out.report.critical_path``). Here they run one
    by one on one device, which saves no time: it shows what several devices would draw.

    ranks 1 is serial sampling.
    """

    ranks: int = 2
    warmup: int = 4
    parallel: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole(1, ranks=self.ranks, warmup=self.warmup)

    def kinds(self, call: Call) -> tuple[str, ...]:
        return ()

    def critical_path(self, evaluations: int) -> int:
        serial = min(self.warmup, evaluations)
        return serial + math.ceil((evaluations - serial) / self.ranks)

    def sample(self, denoise: Callable[..., Any], x: Tensor, *, table: StepTable, generator: Generators = None,
               callback: StepCallback | None = None, before_stage: Callable[[], None] | None = None) -> Tensor:
        """As ``samplers.sample``. before_stage: called before each step is taken; it may raise StopSampling."""
        plan, draw = compile_table(table), noise_source(generator, x)
        coefficients, names = plan.coefficients.to(x.device), len(table.predictions)
        state: list[Any] = [x] * len(table.columns)
        predictions = slice(1, 1 + names)

        def take(state: list[Any], stage: Stage, noise: Tensor | None) -> None:
            if noise is not None:
                state[1 + names] = noise
            advance(table, coefficients, stage, state)

        try:
            done = 0
            while done < table.num_stages:
                size = 1 if done < self.warmup else self.ranks
                stages = plan.stages[done: done + size]
                noises = [draw(done + i, x) if stage.noise else None for i, stage in enumerate(stages)]
                ahead, fresh = list(state), []
                for i, stage in enumerate(stages):
                    own = list(ahead)
                    predict(denoise, own, coefficients, stage, done + i, names)
                    fresh.append(own[predictions])
                    if i + 1 < len(stages):
                        take(ahead, stage, noises[i])
                for stage, found, noise in zip(stages, fresh, noises):
                    if before_stage is not None:
                        before_stage()
                    state[predictions] = found
                    take(state, stage, noise)
                    report(stage, state, callback)
                done += len(stages)
        except StopSampling:
            pass
        return state[0]
