"""The search behind tune: candidates, rounds, the front, and the held-out test. It draws nothing itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .bounds import mean_bound, one_bound, student_quantile
from .settings import Settings

CONFIDENCE, NEW = 0.95, 100
LEAST_CALIBRATION, LEAST_HELD_OUT = 8, 16
FINALISTS = 5
ALIKE = 1.03  # speeds nearer than this are taken as equal: timing says no more
PATIENCE = 40  # plans drawn for one step of a climb


@dataclass
class Candidate:
    """values: of the measure, higher is better (errors negated), one a picture. ratios: of times, one a turn.
    used: the summed indicator of dynamic caches, one a picture. made: the settings of a picture of it. finalists: how
    many were tested on held-out prompts with it."""

    settings: Settings
    values: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    used: list[float] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)
    finalists: int = 1

    @property
    def mean(self) -> float:
        return statistics.fmean(min(v, 100.0) for v in self.values)

    @property
    def speed(self) -> float:
        return statistics.median(self.ratios)

    def expected_bound(self, held_out: int) -> float:
        """What the bound is likely to be after that many held-out pictures."""
        if len(self.values) < 2:
            return -math.inf
        spread = statistics.stdev(min(v, 100.0) for v in self.values)
        return self.mean - student_quantile(CONFIDENCE, held_out - 1) * spread * math.sqrt(1 / held_out + 1 / NEW)


@dataclass(frozen=True)
class Measure:
    """"psnr" or "latent_error" with its limit, as the search sees it: higher is better, errors add as squares."""

    name: str
    limit: float

    def squared(self, value: float) -> float:
        """The squared error that a value stands for, up to a factor."""
        return 10 ** (-min(value, 100.0) / 10) if self.name == "psnr" else value * value

    def value(self, squared: float) -> float:
        return -10 * math.log10(squared) if self.name == "psnr" else -math.sqrt(squared)

    def with_slack(self, share: float) -> float:
        """The limit and a share of 1 dB, or of a tenth of the error; below it where negative."""
        return self.limit + share * (1.0 if self.name == "psnr" else 0.1 * abs(self.limit))


Turn = Callable[[list[Candidate], Sequence[int]], bool]
"""Draws the reference and every candidate for these prompts in turn and adds to their lists, or takes out what cannot
be drawn; False: time is up."""


def combine(measure: Measure, parts: Sequence[Candidate], others: Sequence[Candidate],
            join: Callable[[Settings, Settings], Settings | None], most: int) -> list[Candidate]:
    """The pairs that are likely to keep the promise, fastest first: errors of a pair add as squares of independent
    ones, speeds multiply."""
    found = []
    for a in parts:
        for b in others:
            both = join(a.settings, b.settings)
            value = measure.value(measure.squared(a.mean) + measure.squared(b.mean))
            if both is not None and value >= measure.with_slack(-1.0):
                found.append((a.speed * b.speed, both))
    found.sort(key=lambda pair: -pair[0])
    return [Candidate(settings) for _, settings in found[:most]]


def survivors(measure: Measure, candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """The fastest of those whose mean is not hopeless, each faster than the reference."""
    good = [c for c in candidates if c.values and c.mean >= measure.with_slack(-0.5) and c.speed > 1]
    return sorted(good, key=lambda c: -c.speed)[:most]


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both speed and mean, fastest first (Pareto)."""
    kept: list[Candidate] = []
    for c in sorted((c for c in candidates if c.values), key=lambda c: (-c.speed, -c.mean)):
        if not kept or c.mean > kept[-1].mean:
            kept.append(c)
    return kept


def finalists(measure: Measure, candidates: Sequence[Candidate], held_out: int) -> list[Candidate]:
    """The fastest few of the front that are likely to pass, in the order in which they are tested: the safest first.
    Everything here is decided by calibration prompts alone. Lists are empty again for the held-out ones."""
    likely = [c for c in candidates if c.speed > 1 and c.expected_bound(held_out) >= measure.with_slack(-0.3)]
    fastest = front(likely)[:FINALISTS]
    fastest.sort(key=lambda c: -c.expected_bound(held_out))
    return [Candidate(c.settings, finalists=len(fastest)) for c in fastest]


def passed(measure: Measure, ordered: Sequence[Candidate]) -> list[Candidate]:
    """Those whose held-out lower bound for the mean of NEW more pictures meets the limit, up to the first that fails.

    Testing in an order that was fixed beforehand and ending at the first failure keeps the chance that any setting
    passes wrongly at 1 - CONFIDENCE, however many are tested ("fixed sequence testing" in Angelopoulos et al. 2021,
    "Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control", section 3)."""
    good = []
    for c in ordered:
        if len(c.values) < LEAST_HELD_OUT or mean_bound(c.values, CONFIDENCE, NEW) < measure.limit:
            break
        good.append(c)
    return good


def best(measure: Measure, good: Sequence[Candidate]) -> Candidate | None:
    """The fastest; of those that are as fast, the one with the highest mean. None if none is faster than the
    reference."""
    fastest = max((c.speed for c in good), default=0.0)
    if fastest <= 1:
        return None
    return max((c for c in good if c.speed * ALIKE >= fastest), key=lambda c: c.mean)


def guard_limit(measure: Measure, learnt: Candidate) -> float | None:
    """A budget for the indicator of a dynamic cache, learnt from calibration pictures that ran with it unguarded.

    r = (error of the picture) / (its summed indicator); q: the conformal upper bound of r for one more picture at 80%
    (``one_bound``; with four pictures the largest r). The limit is (promised error) / q, so that a picture that stays
    within it keeps the promise by itself in four of five cases. None where nothing was left out."""
    ratios = [math.sqrt(measure.squared(v)) / u for v, u in zip(learnt.values, learnt.used) if u > 0]
    top = -one_bound([-r for r in ratios], 0.8)
    return math.sqrt(measure.squared(measure.limit)) / top if ratios and 0 < top < math.inf else None


@dataclass(frozen=True)
class Draws:
    """turn draws while the time of the search lasts, brief for a part of it, so that single changes leave some for
    combinations. trial draws one candidate for all calibration prompts, while the time for climbing lasts. test draws
    on held-out prompts while any is left."""

    brief: Turn
    turn: Turn
    trial: Callable[[Candidate], bool]
    test: Turn


def _nothing(measured: Sequence[Candidate]) -> list[Candidate]:
    return []


@dataclass(frozen=True)
class Tries:
    """What is tried. first: precisions. singles, combinations: made from what was measured before. start: where to
    climb from; faster: settings that leave out a little more, one list for each way; nearby: those that take as
    long."""

    first: Sequence[Candidate]
    singles: Callable[[list[Candidate]], list[Candidate]] = _nothing
    combinations: Callable[[list[Candidate]], list[Candidate]] = _nothing
    start: Callable[[list[Candidate]], Candidate | None] = lambda measured: None
    faster: Callable[[Settings], list[list[Settings]]] = lambda settings: []
    nearby: Callable[[Settings], list[Settings]] = lambda settings: []


def run(measure: Measure, draws: Draws, tries: Tries, calibration: Sequence[Sequence[int]],
        held_out: Sequence[Sequence[int]]) -> tuple[Candidate | None, list[Candidate]]:
    """The chosen candidate, tested on held-out prompts, and all that were measured on calibration prompts.

    Precisions and single changes are drawn for the first part of the calibration turns. Combinations then compete with
    them over the other turns, where only half goes on after each (successive halving: Karnin et al. 2013). Last, faster
    plans are climbed to (``climb``)."""
    half, count = max(1, len(calibration) // 2), sum(map(len, held_out))
    alive = list(tries.first)
    if alive:
        draws.turn(alive, calibration[0])
    singles = tries.singles([c for c in alive if c.values])
    if singles:
        draws.turn(singles, calibration[0])
    alive += singles
    for part in calibration[1:half]:
        if not draws.brief(alive, part):
            break
    measured = [c for c in alive if c.values]
    alive = [*tries.combinations(measured), *survivors(measure, measured, 8)]
    for part in calibration[half:]:
        more = draws.turn(alive, part)
        measured += [c for c in alive if c.values and not any(c is m for m in measured)]
        alive = survivors(measure, alive, max(2 * FINALISTS, len(alive) // 2))
        if not more:
            break
    measured = settle(measure, measured, draws.trial, max(count, 2))
    measured += climb(measure, tries.start(measured), tries.faster, tries.nearby, draws.trial, max(count, 2))
    ordered = finalists(measure, measured, max(count, 2)) if measured else []
    for part in held_out if ordered else ():
        if not draws.test(ordered, part):
            break
    complete = min((len(c.values) for c in ordered), default=0)  # a last turn may have been cut short
    for c in ordered:
        del c.values[complete:]
    return best(measure, passed(measure, ordered)), measured


def settle(measure: Measure, measured: Sequence[Candidate], trial: Callable[[Candidate], bool], held_out: int
           ) -> list[Candidate]:
    """The fastest that are likely to pass are drawn again, for all calibration prompts: of many that were seen on a few
    prompts, the best ones look better than they are."""
    likely = [c for c in measured if c.expected_bound(held_out) >= measure.limit]
    again: dict[int, Candidate] = {}
    for c in sorted(likely, key=lambda c: -c.speed)[:2 * FINALISTS]:
        fresh = Candidate(c.settings)
        if not trial(fresh):
            break
        again[id(c)] = fresh
    return [c for c in (again.get(id(c), c) for c in measured) if c.values]


def climb(measure: Measure, start: Candidate | None, faster: Callable[[Settings], list[list[Settings]]],
          nearby: Callable[[Settings], list[Settings]], trial: Callable[[Candidate], bool], held_out: int
          ) -> list[Candidate]:
    """From a plan that is likely to pass to faster ones, step by step: of each way to leave out a little more the best,
    then its better neighbours, which take as long, until the bound is likely to meet the promise with something to
    spare (the best of many looks better than it is), or none is better, or PATIENCE have been drawn. The fastest that
    got there is the next to start from; the climb ends where none did."""
    found: list[Candidate] = []
    seen: list[Settings] = []
    wanted = measure.with_slack(1.0)

    def new(settings: Settings) -> Candidate | None:
        """Drawn; None for one that was before, or fails. Raises TimeoutError when time is up."""
        if settings in seen:
            return None
        seen.append(settings)
        c = Candidate(settings)
        if not trial(c):
            raise TimeoutError
        found.extend([c] if c.values else [])
        return c if c.values else None

    def better(top: Candidate) -> Candidate | None:
        return next((c for c in map(new, nearby(top.settings)) if c is not None and c.mean > top.mean), None)

    with suppress(TimeoutError):
        while start is not None:
            good = []
            for group in faster(start.settings):
                top, before = max(filter(None, map(new, group)), key=lambda c: c.mean, default=None), len(found)
                while top is not None and top.expected_bound(held_out) < wanted and len(found) < before + PATIENCE:
                    higher = better(top)
                    if higher is None:
                        break
                    top = higher
                good += [top] if top is not None and top.expected_bound(held_out) >= measure.limit else []
            start = max(good, key=lambda c: c.speed, default=None)
    return found
