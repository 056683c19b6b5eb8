"""MagCache: all blocks, by how the magnitude of their residual goes on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..errors import LdmfastError
from .policy import Action, Call, Judge, Plan, Policy, check_at_least, check_numbers, check_whole


@dataclass(frozen=True, kw_only=True)
class MagCache(Policy):
    """Ma et al. 2025, "MagCache: Fast Video Generation with Magnitude-Aware Cache", section 4: with the measured ratios
    of the residual's magnitude from one evaluation to the next, the error of reusing is |1 - product of the ratios
    skipped|, summed; the residual of all blocks is reused while the sum is at most ``threshold``. What is skipped is
    known before the call.

    ratios: one for each evaluation (the first is not used), as ``residual_ratios`` measures them; a list of another
    length is spread over the call. most: evaluations in a row that may be reused (their K). retention: share of the
    evaluations at the start that are computed. threshold 0 computes always.
    """

    ratios: Sequence[float]
    threshold: float = 0.06
    most: int = 3
    retention: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", check_numbers("ratios", self.ratios))
        check_at_least(0, threshold=self.threshold, retention=self.retention)
        check_whole(0, most=self.most)

    def kinds(self, call: Call) -> tuple[str, ...]:
        return self._of(call, ("stack",), "the residual of all blocks")

    def plan(self, call: Call) -> Plan:
        return {"stack": self._actions(call.steps)}

    def _actions(self, steps: int) -> tuple[Action, ...]:
        ratios = spread(self.ratios, steps)
        start = max(1, int(min(self.retention, 1) * steps + 0.5))
        made = [Action.COMPUTE] * min(start, steps)
        product, error, skipped = 1.0, 0.0, 0
        for ratio in ratios[start:]:
            product *= ratio
            skipped += 1
            error += abs(1 - product)
            if self.threshold > 0 and error <= self.threshold and skipped <= self.most:
                made.append(Action.REUSE)
            else:
                product, error, skipped = 1.0, 0.0, 0
                made.append(Action.COMPUTE)
        return tuple(made)


def spread(ratios: Sequence[float], steps: int) -> list[float]:
    """Ratios for another number of steps: the nearest of each."""
    if steps == 1:
        return [ratios[-1]]
    index = np.rint(np.arange(steps) * ((len(ratios) - 1) / (steps - 1))).astype(int)
    return [ratios[i] for i in index]


def residual_ratios(pipe: Any, *args: Any, **kwargs: Any) -> list[float]:
    """Runs ``pipe(*args, **kwargs)`` in full and measures, for each evaluation, the magnitude of the residual of all
    blocks over that of the evaluation before (of every token or pixel, then the mean; the first is 1): the ``ratios``
    of MagCache for this network, solver and number of steps."""
    if "cache" in kwargs:
        raise LdmfastError("residual_ratios runs the call in full: leave cache out")
    measure = _Measure()
    pipe(*args, **kwargs, cache=measure)
    rows = [row for row in measure.found if row]
    return [1.0, *(float(np.mean([row[i] for row in rows])) for i in range(len(rows[0]) if rows else 0))]


@dataclass(frozen=True, kw_only=True)
class _Measure(Policy):
    found: list[list[float]] = field(default_factory=list)  # a row for each group of pictures
    dynamic: ClassVar[bool] = True

    def kinds(self, call: Call) -> tuple[str, ...]:
        return self._of(call, ("stack",), "the residual of all blocks")

    def judge(self, call: Call) -> Judge:
        return _Measuring(self)


class _Measuring(Judge):
    kind = "stack"
    before: Tensor | None = None

    def __init__(self, policy: _Measure) -> None:
        super().__init__(policy)
        self.row: list[float] = []
        policy.found.append(self.row)

    def needed(self, step: int, indicator: Tensor) -> bool:
        return True

    def computed(self, step: int, indicator: Tensor, value: Tensor) -> None:
        size = value.float().norm(dim=1 if value.ndim == 4 else -1)
        if self.before is not None:
            self.row.append(float((size / (self.before + 1e-8)).mean()))
        self.before = size
