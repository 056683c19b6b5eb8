"""What a search is about: states that a step table brings to an end, and a verifier that scores the ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LdmfastError, ShapeError
from ..samplers import StepTable, sample
from ..samplers.sample import Denoiser

Verifier = Callable[[Tensor], "Tensor | Sequence[float]"]


@dataclass(frozen=True)
class Candidates:
    """(n, ...) ends and (n,) scores, with the unit noise that they came from and the seed of each one's random
    numbers."""

    ends: Tensor
    scores: Tensor
    noise: Tensor
    seeds: tuple[int, ...]

    def __getitem__(self, rows: Sequence[int]) -> Candidates:
        rows = list(rows)
        return Candidates(self.ends[rows], self.scores[rows], self.noise[rows], tuple(self.seeds[i] for i in rows))

    def best(self, count: int = 1) -> Candidates:
        """The highest scores first; of equal ones, the first drawn."""
        return self[torch.argsort(self.scores, descending=True, stable=True)[:count].tolist()]

    def join(self, other: Candidates) -> Candidates:
        return Candidates(torch.cat([self.ends, other.ends]), torch.cat([self.scores, other.scores]),
                          torch.cat([self.noise, other.noise]), self.seeds + other.seeds)


@dataclass(frozen=True)
class Found:
    """The best end. latents: (1, ...), its state; picture: a PIL picture where a pipeline was searched. score: the
    verifier's word on it. history: the best score after each round. evaluations: of the network, counted once a
    picture (guidance's second branch not apart). verified: ends that were scored. seed: ``pipe(prompt,
    generator=seed)`` draws it again, None where it was not drawn from one seed alone. noise: (1, ...) unit noise of its
    start, None where its path was noised anew."""

    latents: Tensor
    score: float
    history: tuple[float, ...]
    evaluations: int
    verified: int
    seed: int | None = None
    noise: Tensor | None = None
    picture: Any = None


@dataclass
class Problem:
    """One search. Its pictures are run ``batch`` at a time; which ones share a batch decides nothing, since each has
    random numbers of its own.

    table: of the run. denoiser(n): for one run of n states, which remembers nothing of earlier ones; where a run is
    taken up inside, it is told the stages of the whole table. unit_noise(generators): (n, ...), one draw from each.
    verifier: ends to (n,) scores, higher is better. seed: the first picture's, the next ones count on.
    """

    table: StepTable
    denoiser: Callable[[int], Denoiser]
    unit_noise: Callable[[list[torch.Generator]], Tensor]
    verifier: Verifier
    seed: int = 0
    batch: int = 8
    evaluations: int = 0
    verified: int = 0
    history: list[float] = field(default_factory=list)

    def fresh(self, count: int) -> tuple[Tensor, tuple[int, ...], list[torch.Generator]]:
        """Unit noise of pictures that were not drawn before."""
        seeds = tuple(range(self.seed, self.seed + count))
        self.seed += count
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        parts = [self.unit_noise(generators[i:i + self.batch]) for i in range(0, count, self.batch)]
        return torch.cat(parts), seeds, generators

    def start(self, noise: Tensor, seeds: tuple[int, ...], generators: list[torch.Generator]) -> Candidates:
        """Whole runs."""
        return self._finish(noise * self.table.init_noise_sigma, self.table, 0, noise, seeds, generators)

    def renoised(self, parents: Candidates, step: int, children: int) -> Candidates:
        """Each parent's end noised anew to the start of ``step``, ``children`` times, and run from there."""
        again = parents[[i for i in range(len(parents.scores)) for _ in range(children)]]
        noise, seeds, generators = self.fresh(len(again.scores))
        table, first = later(self.table, step)
        return self._finish(self.table.add_noise(again.ends, noise.to(again.ends), step), table, first, noise, seeds,
                            generators)

    def _finish(self, states: Tensor, table: StepTable, skipped: int, noise: Tensor, seeds: tuple[int, ...],
                generators: list[torch.Generator]) -> Candidates:
        """skipped: stages of the whole table before this one's."""
        ends, scores = [], []
        for first in range(0, len(states), self.batch):
            part = states[first:first + self.batch]
            denoise = partial(_moved, self.denoiser(len(part)), skipped)
            end = sample(denoise, part, table=table, generator=generators[first:first + self.batch])
            score = torch.as_tensor(self.verifier(end)).detach().double().cpu()
            if score.shape != (len(part),) or bool(score.isnan().any()):
                raise ShapeError(f"search: the verifier's scores have shape {tuple(score.shape)}, or NaN among them; "
                                 f"it must give one number for each of {len(part)}")
            ends.append(end)
            scores.append(score)
        self.evaluations += table.num_stages * len(states)
        self.verified += len(states)
        return Candidates(torch.cat(ends), torch.cat(scores), noise, seeds)


def _moved(denoise: Denoiser, by: int, x: Tensor, t: float, stage: int) -> Any:
    return denoise(x, t, stage + by)


def later(table: StepTable, step: int) -> tuple[StepTable, int]:
    """A table from one of its steps on, and the number of its first stage in the whole.

    Raises LdmfastError for a solver that carries predictions over steps."""
    if not 0 <= step < table.num_steps:
        raise LdmfastError(f"search: step {step} is not one of the table's 0..{table.num_steps - 1}")
    first = int(np.argmax(np.asarray(table.step_index) == step))
    kept = len(table.columns) - table.num_registers
    starts = np.append(True, np.asarray(table.step_end)[:-1])
    if (table.matrices[starts][:, :, kept:] != 0).any() and step:
        raise LdmfastError(f"search: {table.solver} carries predictions from step to step, so that a path cannot be "
                           "taken up inside a run; use ddim, euler, heun, flow_euler or another one-step solver")
    solver_times = None if table.solver_times is None else table.solver_times[first:]
    return replace(table, matrices=table.matrices[first:], network_times=table.network_times[first:],
                   c_in=table.c_in[first:], step_index=table.step_index[first:] - step,
                   timesteps=table.timesteps[step:], noise_levels=table.noise_levels[step:],
                   x0_rows=table.x0_rows[first:], start=table.start + step, solver_times=solver_times), first
