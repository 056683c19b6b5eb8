"""PAB: attention outputs broadcast to the next evaluations, prompt attention to more of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .policy import Action, Call, Plan, Policy, check_numbers, check_whole


@dataclass(frozen=True, kw_only=True)
class PAB(Policy):
    """Zhao et al. 2024, "Real-Time Video Generation with Pyramid Attention Broadcast", section 3.3, with the schedule
    of diffusers' PyramidAttentionBroadcast: within a range of network times an attention is computed at evaluations
    that are multiples of its range, and reused at the others.

    self_range, cross_range: 1 computes always. self_times, cross_times: between which times (both excluded), in the
    network's units (0 to 1000; FLUX 0 to 1, where it takes (0.1, 0.8)).
    """

    self_range: int = 2
    cross_range: int = 3
    self_times: tuple[float, float] = (100, 800)
    cross_times: tuple[float, float] = (100, 800)

    def __post_init__(self) -> None:
        check_whole(1, self_range=self.self_range, cross_range=self.cross_range)
        for name in ("self_times", "cross_times"):
            object.__setattr__(self, name, check_numbers(name, getattr(self, name), 2))

    def kinds(self, call: Call) -> tuple[str, ...]:
        return self._of(call, ("self", "cross"), "attention outputs")

    def plan(self, call: Call) -> Plan:
        settings = {"self": (self.self_range, self.self_times), "cross": (self.cross_range, self.cross_times)}
        return {k: _broadcast(call.times, *settings[k]) for k in self.kinds(call)}


def _broadcast(times: Sequence[float], every: int, between: tuple[float, float]) -> tuple[Action, ...]:
    low, high = between
    return tuple(Action.COMPUTE if i % every == 0 or not low < t < high else Action.REUSE for i, t in enumerate(times))
