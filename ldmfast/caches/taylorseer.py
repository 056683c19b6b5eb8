"""TaylorSeer: forecasts from the last computed values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LdmfastError
from .fora import LAYERS
from .policy import (
    Action,
    Call,
    Interval,
    Plan,
    Policy,
    actions,
    check_branch,
    check_interval,
    check_whole,
    computed_steps,
)


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Policy):
    """Between computed evaluations a segment's value is a Taylor series in the number of evaluations, its derivatives
    the backward differences of the values computed (Liu et al. 2025, "From Reusing to Forecasting: Accelerating
    Diffusion Models with TaylorSeers", equations 2 to 4). One ``lincomb`` of the values held.

    order: 1 to 3; 0 reuses the last value. interval, first, last: the first ``first`` and last ``last`` evaluations are
    computed and every ``interval``-th between; or interval is the rising list of those to compute, which starts with 0.
    on: what is forecast: "layers" (attention and feed-forward outputs, the paper's), "deep" (of a UNet, with
    ``branch`` as in DeepCache), "stack" (the residual of all blocks together) or "output" (the network's prediction:
    nothing at all runs between).
    """

    interval: Interval = 3
    order: int = 1
    on: str = "layers"
    first: int = 2
    last: int = 0
    branch: int = 0  # type: ignore[misc]

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", check_interval("interval", self.interval))
        check_whole(0, first=self.first, last=self.last, order=self.order)
        if self.order > 3:
            raise LdmfastError(f"order={self.order!r}: TaylorSeer has orders 0 to 3")
        if self.on not in ("layers", "deep", "stack", "output"):
            raise LdmfastError(f"on={self.on!r}: TaylorSeer forecasts 'layers', 'deep', 'stack' or 'output'")

    @property
    def held(self) -> int:
        return self.order + 1

    def kinds(self, call: Call) -> tuple[str, ...]:
        found = self._of(call, LAYERS if self.on == "layers" else (self.on,), f"{self.on!r} segments")
        if self.on == "deep":
            check_branch(call, self.branch)
        return found

    def plan(self, call: Call) -> Plan:
        computed = computed_steps(self.interval, call.steps, self.first, self.last)
        return dict.fromkeys(self.kinds(call), actions(computed, Action.FORECAST if self.order else Action.REUSE))

    def weights(self, steps: Sequence[int], step: int) -> list[float]:
        return taylor_weights(steps, step)


def taylor_weights(steps: Sequence[int], step: int) -> list[float]:
    """Coefficients of values computed at ``steps`` (the newest first) in their Taylor series at ``step``.

    The j-th derivative at the newest is the difference of the (j-1)-th ones at the two newest, divided by the distance
    of these two (equation 3 for an interval that varies).
    """
    n = len(steps)
    # rows[j][i]: coefficient of value i in the j-th derivative at the newest; made oldest first, as the run made them
    rows = [[0.0] * n for _ in range(n)]
    for newest in reversed(range(n)):
        own = [0.0] * n
        own[newest] = 1.0
        new = [own]
        for j in range(n - 1 - newest):
            gap = steps[newest] - steps[newest + 1]
            new.append([(a - b) / gap for a, b in zip(new[j], rows[j])])
        rows = new + [[0.0] * n] * (n - len(new))
    ahead = step - steps[0]
    return [sum(rows[j][i] * ahead**j / math.factorial(j) for j in range(n)) for i in range(n)]
