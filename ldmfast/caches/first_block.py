"""First-Block cache: all blocks but the first, while the first changes little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .policy import Call, Judge, Policy, check_at_least


@dataclass(frozen=True, kw_only=True)
class FirstBlock(Policy):
    """The first block always runs. While its residual differs from that of the last full evaluation by less than
    ``threshold`` (mean absolute difference over mean absolute value), the residual of all other blocks is reused
    (ParaAttention's First Block Cache; diffusers' FirstBlockCache).

    threshold 0 computes always. In a UNet the first block is the first ResNet block with its attention.
    """

    threshold: float = 0.1
    dynamic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_at_least(0, threshold=self.threshold)

    def kinds(self, call: Call) -> tuple[str, ...]:
        return self._of(call, ("tail",), "the blocks after the first")

    def judge(self, call: Call) -> Judge:
        return _Judge(self)


class _Judge(Judge):
    kind = "tail"
    policy: FirstBlock
    residual: Tensor

    def needed(self, step: int, indicator: Tensor) -> bool:
        self.value = relative_change(indicator, self.residual)
        return not self.value < self.policy.threshold

    def computed(self, step: int, indicator: Tensor, value: Tensor) -> None:
        self.residual = indicator


def relative_change(x: Tensor, before: Tensor) -> float:
    """mean |x - before| / mean |before|, in fp32."""
    before = before.float()
    return float((x.float() - before).abs().mean() / before.abs().mean())
