"""The searches of Ma et al. 2025, "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps"."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ..caches.policy import check_whole
from ..errors import LdmfastError
from .problem import Candidates, Problem


class Method(ABC):
    """A way of spending evaluations on noises."""

    @abstractmethod
    def run(self, problem: Problem) -> Candidates:
        """The best candidate. Writes the best score after each round into ``problem.history``."""


@dataclass(frozen=True)
class BestOfN(Method):
    """n independent noises, the best end ("random search"). Of a reward with distribution function F the score has
    F^n. Costs n runs."""

    n: int = 8

    def __post_init__(self) -> None:
        check_whole(1, n=self.n)

    def run(self, problem: Problem) -> Candidates:
        best = problem.start(*problem.fresh(self.n)).best()
        problem.history.append(float(best.scores[0]))
        return best


@dataclass(frozen=True)
class ZeroOrder(Method):
    """Rounds of n noises around the best so far, which stays unless one is better ("zero-order search"): the score
    never falls. A neighbour is sqrt(1 - d^2) noise + d fresh noise with d = ``distance``, which is unit noise as well;
    at 1 this is best of 1 + n rounds. Costs 1 + n rounds runs."""

    n: int = 4
    rounds: int = 4
    distance: float = 0.5

    def __post_init__(self) -> None:
        check_whole(1, n=self.n, rounds=self.rounds)
        if not 0 < self.distance <= 1:
            raise LdmfastError(f"ZeroOrder: distance={self.distance}, must be above 0 and at most 1")

    def run(self, problem: Problem) -> Candidates:
        best = problem.start(*problem.fresh(1))
        for _ in range(self.rounds):
            fresh, seeds, generators = problem.fresh(self.n)
            near = (1 - self.distance**2) ** 0.5 * best.noise + self.distance * fresh
            best = best.join(problem.start(near, seeds, generators)).best()
            problem.history.append(float(best.scores[0]))
        return best


@dataclass(frozen=True)
class PathSearch(Method):
    """n runs, of which the best ``keep`` go on: at each fraction of ``back`` they are noised anew to the level that a
    run has there, n in all, and run to the end; the best ``keep`` of old and new go on ("search over paths", scored on
    finished ends). Early fractions change what is drawn, late ones its details; 0 starts again from noise. Needs a
    one-step solver. Costs n runs, and for each fraction f n runs of 1 - f of the steps."""

    n: int = 4
    keep: int = 1
    back: Sequence[float] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        check_whole(1, n=self.n, keep=self.keep)
        if self.n % self.keep or not all(0 <= f < 1 for f in self.back):
            raise LdmfastError(f"PathSearch: n={self.n} must be a multiple of keep={self.keep}, and back={self.back} "
                               "fractions from 0 to below 1")

    def run(self, problem: Problem) -> Candidates:
        kept = problem.start(*problem.fresh(self.n)).best(self.keep)
        problem.history.append(float(kept.scores[0]))
        for fraction in self.back:
            step = int(fraction * problem.table.num_steps)
            kept = kept.join(problem.renoised(kept, step, self.n // self.keep)).best(self.keep)
            problem.history.append(float(kept.scores[0]))
        return kept.best()
