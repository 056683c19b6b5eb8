"""TeaCache: all blocks, while the modulated input of the first has moved little since they ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .first_block import relative_change
from .policy import Call, Judge, Policy, check_at_least, check_numbers


@dataclass(frozen=True, kw_only=True)
class TeaCache(Policy):
    """Liu et al. 2024, "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model", equations 4 to 7: the
    relative L1 change of the first block's input, normed and modulated by the time, goes through a polynomial and is
    summed over evaluations; the residual of all blocks is reused while the sum stays below ``threshold``.

    threshold 0 computes always. coefficients: of the polynomial, the highest power first, fitted for a network (their
    equation 6); (1, 0) leaves the change as it is. The first and the last evaluation are computed. In a UNet the
    indicator is the input of the first ResNet block, normed, with its time embedding.
    """

    threshold: float = 0.2
    coefficients: Sequence[float] = (1.0, 0.0)
    dynamic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficients", check_numbers("coefficients", self.coefficients))
        check_at_least(0, threshold=self.threshold)

    def kinds(self, call: Call) -> tuple[str, ...]:
        return self._of(call, ("stack",), "the residual of all blocks")

    def judge(self, call: Call) -> Judge:
        return _Judge(self, call.steps - 1)


class _Judge(Judge):
    kind = "stack"
    policy: TeaCache

    def __init__(self, policy: TeaCache, last: int) -> None:
        super().__init__(policy)
        self.last, self.sum = last, 0.0
        self.before: Tensor | None = None

    def needed(self, step: int, indicator: Tensor) -> bool:
        assert self.before is not None
        change, self.before = relative_change(indicator, self.before), indicator
        moved = 0.0
        for c in self.policy.coefficients:
            moved = moved * change + c
        self.sum += moved
        self.value = self.sum
        return step >= self.last or self.policy.threshold == 0 or not self.sum < self.policy.threshold

    def computed(self, step: int, indicator: Tensor, value: Tensor) -> None:
        self.before, self.sum = indicator, 0.0
