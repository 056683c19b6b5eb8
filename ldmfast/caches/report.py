"""What a cache did in a call: counted, for ``out.report``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .guard import GuardUse
    from .session import Session


@dataclass(frozen=True)
class CacheReport:
    """policies: as given. steps: evaluations that the sampler asked for. evaluations: for each group of pictures that
    share forwards, how many of them ran the network at all. single: of these, without the unconditional branch.
    computed, reused, forecast: segments by kind, over all groups. decisions: for each group the kinds that were not
    computed, evaluation by evaluation. bytes: the most that was held at once, all groups together.
    critical_path: evaluations one after another if those that do not wait for each other ran at once.
    guards: what each Guard had as its budget and used of it, group by group. promise: what tuned settings promised of
    such pictures, None where the call was made without.
    """

    policies: tuple[str, ...]
    steps: int
    evaluations: tuple[int, ...]
    single: tuple[int, ...]
    computed: dict[str, int]
    reused: dict[str, int]
    forecast: dict[str, int]
    decisions: tuple[tuple[str, ...], ...]
    bytes: int
    critical_path: int
    guards: tuple[GuardUse, ...] = ()
    promise: str | None = None

    @classmethod
    def plain(cls, steps: int) -> CacheReport:
        """Of a call without a cache, which counts nothing but its steps."""
        return cls((), steps, (), (), {}, {}, {}, (), 0, steps)

    @classmethod
    def of(cls, given: Sequence[Session | None]) -> CacheReport | None:
        """Of a call's sessions; None where it had no cache."""
        sessions = [s for s in given if s is not None]
        if not sessions:
            return None
        computed, reused, forecast = (dict(sum((getattr(s, name) for s in sessions), Counter()))
                                      for name in ("computed", "reused", "forecast"))
        evaluations = max(s.evaluations for s in sessions)
        return cls(tuple(repr(p) for p in sessions[0].policies), sessions[0].call.steps,
                   tuple(s.evaluations for s in sessions), tuple(s.single_evaluations for s in sessions),
                   computed, reused, forecast,
                   tuple(tuple("+".join(sorted(kinds)) for kinds in s.skipped) for s in sessions),
                   sum(s.store.peak for s in sessions),
                   min(p.critical_path(evaluations) for p in sessions[0].policies),
                   tuple(use for s in sessions for use in s.guards()))
