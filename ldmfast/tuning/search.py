"""The search behind tune: candidates, rounds, the front, and the held-out test. It draws nothing itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .bounds import mean_bound, one_bound, student_quantile
from .settings import Settings

CONFIDENCE, NEW = 0.95, 100
LEAST_CALIBRATION, LEAST_HELD_OUT = 8, 16
FINALISTS = 5
ALIKE = 1.03  # speeds nearer than this are taken as equal: timing says no more


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
            slack = 1.0 if measure.name == "psnr" else 0.1 * abs(measure.limit)
            if both is not None and value >= measure.limit - slack:
                found.append((a.speed * b.speed, both))
    found.sort(key=lambda pair: -pair[0])
    return [Candidate(settings) for _, settings in found[:most]]


def survivors(measure: Measure, candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """The fastest of those whose mean is not hopeless, each faster than the reference."""
    slack = 0.5 if measure.name == "psnr" else 0.05 * abs(measure.limit)
    good = [c for c in candidates if c.values and c.mean >= measure.limit - slack and c.speed > 1]
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
    slack = 0.3 if measure.name == "psnr" else 0.03 * abs(measure.limit)
    likely = [c for c in candidates if c.speed > 1 and c.expected_bound(held_out) >= measure.limit - slack]
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
    """What is tried. first: precisions. singles, combinations: made from what was measured before. ladder: where to
    climb from, slowest first; nearby: settings that take as long as others."""

    first: Sequence[Candidate]
    singles: Callable[[list[Candidate]], list[Candidate]] = _nothing
    combinations: Callable[[list[Candidate]], list[Candidate]] = _nothing
    ladder: Callable[[list[Candidate]], list[Candidate]] = _nothing
    nearby: Callable[[Settings], list[Settings]] = lambda settings: []


def run(measure: Measure, draws: Draws, tries: Tries, calibration: Sequence[Sequence[int]],
        held_out: Sequence[Sequence[int]]) -> tuple[Candidate | None, list[Candidate]]:
    """The chosen candidate, tested on held-out prompts, and all that were measured on calibration prompts.

    Precisions and single changes are drawn for the first part of the calibration turns. Combinations then compete with
    them over the other turns, where only half goes on after each (successive halving: Karnin et al. 2013). Last, plans
    that are faster still are climbed from (``climb``)."""
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
    measured += climb(measure, tries.ladder(measured), tries.nearby, draws.trial, max(count, 2))
    ordered = finalists(measure, measured, max(count, 2)) if measured else []
    for part in held_out if ordered else ():
        if not draws.test(ordered, part):
            break
    complete = min((len(c.values) for c in ordered), default=0)  # a last turn may have been cut short
    for c in ordered:
        del c.values[complete:]
    return best(measure, passed(measure, ordered)), measured


def climb(measure: Measure, ladder: Sequence[Candidate], nearby: Callable[[Settings], list[Settings]],
          trial: Callable[[Candidate], bool], held_out: int) -> list[Candidate]:
    """From each rung, slowest first, to better neighbours, until the bound is likely to meet the promise or none is
    better. Two rungs in turn that do not get there end it: what is faster still will hardly."""
    found: list[Candidate] = []
    failed, seen = 0, [rung.settings for rung in ladder]
    for top in ladder:
        if failed == 2 or not trial(top):
            break
        found.append(top)
        while top.expected_bound(held_out) < measure.limit:
            better = None
            for settings in nearby(top.settings):
                if settings in seen:
                    continue
                seen.append(settings)
                found.append(Candidate(settings))
                if not trial(found[-1]):
                    return [c for c in found if c.values]
                if found[-1].values and found[-1].mean > top.mean:
                    better = found[-1]
                    break
            if better is None:
                break
            top = better
        failed = 0 if top.expected_bound(held_out) >= measure.limit else failed + 1
    return [c for c in found if c.values]
