"""CFGCache: at some evaluations the conditional branch alone runs, and the others of guidance follow it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LdmfastError
from .policy import Action, Call, Interval, Plan, Policy, actions, check_interval, check_whole, computed_steps
from .taylorseer import taylor_weights


@dataclass(frozen=True, kw_only=True)
class CFGCache(Policy):
    """Between evaluations in full, the unconditional prediction (and those of other guidance branches) is the
    conditional one plus their difference, forecast from the last differences: half of the work of an evaluation, and
    guidance goes on. The CFG-Cache of Lv et al. 2024, "FasterCache: Training-Free Video Diffusion Model Acceleration
    with High Quality", section 3.3, with a Taylor series of the whole difference in place of weights for its low and
    high frequencies.

    order: 0 holds the last difference, 1 to 3 forecast it as TaylorSeer does. interval, first, last: the first
    ``first`` and last ``last`` evaluations run in full and every ``interval``-th between; or interval is the rising
    list of those in full, which starts with 0. Without guidance there is nothing to leave out.
    """

    interval: Interval = 2
    order: int = 1
    first: int = 2
    last: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", check_interval("interval", self.interval))
        check_whole(0, first=self.first, last=self.last, order=self.order)
        if self.order > 3:
            raise LdmfastError(f"order={self.order!r}: CFGCache has orders 0 to 3")

    @property
    def held(self) -> int:
        return self.order + 1

    def kinds(self, call: Call) -> tuple[str, ...]:
        return ("guidance",)

    def plan(self, call: Call) -> Plan:
        computed = computed_steps(self.interval, call.steps, self.first, self.last)
        return {"guidance": actions(computed, Action.FORECAST if self.order else Action.REUSE)}

    def weights(self, steps: Sequence[int], step: int) -> list[float]:
        return taylor_weights(steps, step)
