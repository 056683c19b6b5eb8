"""What tune tries: precisions, single changes in the fastest of them, combinations, and plans to climb from."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..caches import DeepCache, EasyCache, FirstBlock, Guard, Policy, TaylorSeer, TeaCache
from ..errors import LdmfastError
from . import plans
from .search import ALIKE, Candidate, Measure, combine, guard_limit
from .settings import Settings, in_precision

if TYPE_CHECKING:
    from ..pipelines import Pipeline

SHARES = (0.75, 0.5, 0.4, 0.3)  # of the reference's steps, for solvers
EVALUATIONS = (0.2, 0.5)  # of the reference's stages: least and most of a placed plan
COMBINED = 12


def precisions(pipe: Pipeline, reference: Settings) -> tuple[list[str], list[str]]:
    """Those other than the reference's that this device runs and the model can be opened in; and why others are not."""
    found, notes = [], []
    for name in ("bf16", "int8", "fp8"):
        if name == reference.precision or (name == "fp8" and pipe.device.type == "cpu"):  # there it is only computed
            continue
        try:
            in_precision(pipe, name)
            found.append(name)
        except LdmfastError as error:
            notes.append(f"{name} was not tried: {error}")
    return found, notes


def fastest(measure: Measure, reference: Settings, precisions: Sequence[Candidate]) -> Settings:
    """The fastest precision whose own error takes no more than a quarter of the promised squared one: everything else
    is tried in it. The reference's where there is none."""
    good = [c for c in precisions if measure.squared(c.mean) <= 0.25 * measure.squared(measure.limit) and c.speed > 1]
    return max(good, key=lambda c: c.speed).settings if good else reference


def singles(pipe: Pipeline, base: Settings, made: dict[str, Any], products: tuple[np.ndarray, np.ndarray] | None
            ) -> list[Candidate]:
    """Settings that differ from ``base`` in one respect: solver with steps, or cache. made: of the reference."""
    found = []
    steps = int(made["num_inference_steps"])
    own = [made["solver"]] if made["solver"] in ("ddim", "euler", "flow_euler", "dpmpp_2m", "unipc") else []
    for solver in dict.fromkeys([*own, "dpmpp_2m", "unipc"]):
        for count in sorted({max(2, round(steps * share)) for share in SHARES}, reverse=True):
            if base.timesteps is None and count < steps:
                found.append(dataclasses.replace(base, solver=solver, steps=count))
    if not base.cache:
        found += [dataclasses.replace(base, cache=cache) for cache in caches(pipe, products, steps)]
    return [Candidate(settings) for settings in found]


def caches(pipe: Pipeline, products: tuple[np.ndarray, np.ndarray] | None, steps: int) -> list[tuple[Policy, ...]]:
    """Forecasts of the output at placed evaluations, forecasts and reuse of the deep part, dynamic caches (unguarded,
    to learn their limits)."""
    found: list[tuple[Policy, ...]] = []
    if products is None:
        found += [(TaylorSeer(interval=n, order=o, on="output"),) for n in (2, 3, 4) for o in (1, 2)]
    else:
        least, most = (max(2, round(steps * share)) for share in EVALUATIONS)
        best: dict[int, list[tuple[float, int, tuple[int, ...]]]] = {}
        for order in (0, 1, 2):
            for n, plan in plans.placements(*products, order, least).items():
                best.setdefault(n, []).append((plans.foreseen(plan, order, *products), order, plan))
        for n in range(least, most + 1):
            for _, order, plan in sorted(best.get(n, ()))[:2]:
                found.append((TaylorSeer(interval=plan, order=order, on="output"),))
    segments = getattr(pipe.unet, "segments", ())
    if "deep" in segments:
        found += [(DeepCache(interval=2),), (DeepCache(interval=3),), (TaylorSeer(interval=3, on="deep"),)]
    dynamic = (("output", EasyCache(threshold=1.0)), ("tail", FirstBlock(threshold=0.4)),
               ("stack", TeaCache(threshold=1.0)))
    return found + [(Guard(policy=policy, limit=float("inf")),) for kind, policy in dynamic if kind in segments]


def combinations(measure: Measure, base: Settings, measured: Sequence[Candidate]) -> list[Candidate]:
    """Pairs of single changes that should keep the promise: other precisions with caches and solvers, solvers with a
    deep cache; and guarded dynamic caches with the limits learnt."""
    others = [c for c in measured if c.settings.precision != base.precision and not c.settings.cache]
    cached = [c for c in measured if c.settings.cache and not _guarded(c.settings)]
    solvers = [c for c in measured if not c.settings.cache and c.settings.precision == base.precision
               and c.settings != base]
    own = next((c.speed for c in measured if c.settings == base), 1.0)
    even = [c for c in cached if isinstance(c.settings.cache[0], DeepCache)]
    # both are ratios to the reference, and what they are combined with is in the base's precision
    found = combine(measure, [c for c in others if c.speed > own / 1.1], [*cached, *solvers], _joined, COMBINED)
    found += combine(measure, solvers, even, _joined, 3)
    for c in measured:
        limit = guard_limit(measure, c) if _guarded(c.settings) else None
        if limit is not None:
            guard = c.settings.cache[0]
            assert isinstance(guard, Guard)
            found.append(Candidate(dataclasses.replace(c.settings, cache=(Guard(policy=guard.policy, limit=limit),))))
    return found


def ladder(measure: Measure, base: Settings, measured: Sequence[Candidate],
           products: tuple[np.ndarray, np.ndarray] | None, held_out: int) -> list[Candidate]:
    """Placed forecasts, some with shallow evaluations (a DeepCache of the others), that should be faster than all that
    are likely to pass, the slowest first; of those that should take as long, the one with most evaluations."""
    placed = [c for c in measured if _placed(c.settings) and len(c.settings.cache) == 1
              and c.settings.precision == base.precision]
    counts = [len(c.settings.cache[0].interval) for c in placed]  # type: ignore[attr-defined]
    if products is None or len(set(counts)) < 2:
        return []
    each, once = np.polyfit(counts, [1 / c.speed for c in placed], 1)
    likely = [c.speed for c in measured if c.expected_bound(held_out) >= measure.limit]
    even = next((c for c in measured if c.settings == dataclasses.replace(base, cache=(DeepCache(interval=2),))), None)
    stages = len(products[1])
    share = 1.0  # of an evaluation's time, that of a shallow one
    if even is not None and each > 0:
        share = max(0.0, 2 * (1 / even.speed - once) / (stages * each) - 1)
    rungs = sorted(((once + each * (n + m * share), n, m) for n in range(2, stages) for m in range(4 if even else 1)
                    if n + m < stages and m < n), reverse=True)
    best = {order: plans.placements(*products, order, 2) for order in (1, 2)}
    found: list[Candidate] = []
    before = 1 / max(likely, default=1.0)
    for time, n, m in rungs:
        if 0 < time < before / ALIKE:
            before = time
            _, order, plan = min((plans.foreseen(best[o][n + m], o, *products), o, best[o][n + m]) for o in best)
            found.append(Candidate(_plan(base, plan, order, plan[-1:-2 * m:-2] if m else ())))
    return found


def nearby(stages: int, settings: Settings) -> list[Settings]:
    """Placed forecasts that take as long: one evaluation earlier or later, or a shallow one and the next exchanged; and
    of the other order."""
    taylor = settings.cache[0]
    assert isinstance(taylor, TaylorSeer) and not isinstance(taylor.interval, int)
    plan = tuple(taylor.interval)
    full = settings.cache[1].interval if len(settings.cache) > 1 else plan  # type: ignore[attr-defined]
    shallow = set(plan) - set(full)
    found = [_plan(settings, plan, 3 - taylor.order, shallow)]
    for i, at in enumerate(plan[1:], 1):
        for to in (at - 1, at + 1):
            if to not in plan and to < stages:
                moved = {to if s == at else s for s in shallow}
                found.append(_plan(settings, (*plan[:i], to, *plan[i + 1:]), taylor.order, moved))
        following = plan[i + 1] if i + 1 < len(plan) else None
        if following is not None and (at in shallow) != (following in shallow):
            found.append(_plan(settings, plan, taylor.order, shallow ^ {at, following}))
    random.Random(len(found)).shuffle(found)
    return found


def _plan(settings: Settings, plan: Sequence[int], order: int, shallow: Collection[int]) -> Settings:
    forecast = TaylorSeer(interval=tuple(plan), order=order, on="output")
    deep = DeepCache(interval=tuple(i for i in plan if i not in shallow))
    return dataclasses.replace(settings, cache=(forecast, deep) if shallow else (forecast,))


def _placed(settings: Settings) -> bool:
    policy = settings.cache[0] if settings.cache else None
    return isinstance(policy, TaylorSeer) and policy.on == "output" and not isinstance(policy.interval, int)


def _joined(a: Settings, b: Settings) -> Settings | None:
    """b with a's precision, solver and cache where b has none of its own."""
    if a.cache and b.cache:
        return None
    solver = a if a.solver is not None else b
    return dataclasses.replace(b, precision=a.precision, solver=solver.solver, steps=solver.steps,
                               cache=a.cache or b.cache)


def _guarded(settings: Settings) -> bool:
    return any(isinstance(p, Guard) for p in settings.cache)
