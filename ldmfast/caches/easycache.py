"""EasyCache: the whole network, while its output is expected to change little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .policy import Call, Judge, Policy, check_at_least, check_whole


@dataclass(frozen=True, kw_only=True)
class EasyCache(Policy):
    """Zhou et al. 2025, "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive Caching",
    equations 3 to 7: how much the output moves for a move of the input is taken from the last two full evaluations;
    the relative change that it foretells is summed, and the network is left out while the sum stays below
    ``threshold``.

    threshold 0 computes always. warmup: evaluations at the start that are computed; so is the last. vector: as in the
    paper, what is reused is output minus input, which suits velocities; False reuses the output, which suits networks
    that predict noise.
    """

    threshold: float = 0.1
    warmup: int = 3
    vector: bool = False  # type: ignore[misc]
    dynamic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least(0, threshold=self.threshold)
        check_whole(0, warmup=self.warmup)

    def kinds(self, call: Call) -> tuple[str, ...]:
        return self._of(call, ("output",), "the network's output")

    def judge(self, call: Call) -> Judge:
        return _Judge(self, call.steps - 1)


class _Judge(Judge):
    kind = "output"
    policy: EasyCache

    def __init__(self, policy: EasyCache, last: int) -> None:
        super().__init__(policy)
        self.last, self.sum = last, 0.0
        self.rate: float | None = None
        self.input: Tensor  # of this evaluation or the last
        self.full: tuple[Tensor, Tensor] | None = None  # input and output of the last full evaluation

    def needed(self, step: int, indicator: Tensor) -> bool:
        before, self.input = self.input, indicator
        if step < self.policy.warmup or step >= self.last or self.rate is None or self.full is None:
            return True
        moved = float((indicator.float() - before.float()).abs().mean() / self.full[1].float().abs().mean())
        self.sum += self.rate * moved
        self.value = self.sum
        return not self.sum < self.policy.threshold

    def computed(self, step: int, indicator: Tensor, value: Tensor) -> None:
        if self.full is not None:
            x, y = self.full
            moved = float((indicator.float() - x.float()).abs().mean())
            self.rate = None if moved == 0 else float((value.float() - y.float()).abs().mean()) / moved
        self.input, self.full, self.sum = indicator, (indicator, value), 0.0
