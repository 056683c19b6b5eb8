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
from .search import Candidate, Measure, combine, guard_limit
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
    is tried in it; of those that are nearly as fast, the nearest to exact. The reference's where there is none."""
    good = [c for c in precisions if measure.squared(c.mean) <= 0.25 * measure.squared(measure.limit) and c.speed > 1]
    top = max((c.speed for c in good), default=1.0)
    best = max((c for c in good if c.speed > 0.9 * top), key=lambda c: c.mean, default=None)
    return reference if best is None else best.settings


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


def start(measure: Measure, base: Settings, measured: Sequence[Candidate], held_out: int) -> Candidate | None:
    """The fastest placed forecast that is likely to pass with something to spare."""
    good = [c for c in measured if _placed(c.settings) and c.settings.precision == base.precision
            and c.expected_bound(held_out) >= measure.with_slack(1.0)]
    return max(good, key=lambda c: c.speed, default=None)


def faster(pipe: Pipeline, settings: Settings) -> list[list[Settings]]:
    """Placed forecasts that leave out a little more: those of one evaluation fewer, and those of which one more is
    shallow (a DeepCache of the others)."""
    plan, order, shallow = _parts(settings)
    deep = "deep" in getattr(pipe.unet, "segments", ())
    if len(plan) == 2:
        return []
    fewer = [_plan(settings, [i for i in plan if i != at], order, shallow - {at}) for at in plan[1:]]
    return [fewer, [_plan(settings, plan, order, shallow | {at}) for at in plan[1:] if deep and at not in shallow]]


def nearby(stages: int, settings: Settings) -> list[Settings]:
    """Placed forecasts that take as long: one evaluation earlier or later, or a shallow one and the next exchanged; and
    of the other order."""
    plan, order, shallow = _parts(settings)
    found = [_plan(settings, plan, 1 if order == 2 else 2, shallow)]
    for i, at in enumerate(plan[1:], 1):
        for to in (at - 1, at + 1):
            if to not in plan and to < stages:
                moved = {to if s == at else s for s in shallow}
                found.append(_plan(settings, (*plan[:i], to, *plan[i + 1:]), order, moved))
        following = plan[i + 1] if i + 1 < len(plan) else None
        if following is not None and (at in shallow) != (following in shallow):
            found.append(_plan(settings, plan, order, shallow ^ {at, following}))
    random.Random(len(found)).shuffle(found)
    return found


def _parts(settings: Settings) -> tuple[tuple[int, ...], int, set[int]]:
    """Of a placed forecast: the evaluations, its order, and those that are shallow."""
    taylor, *rest = settings.cache
    assert isinstance(taylor, TaylorSeer) and not isinstance(taylor.interval, int)
    plan = tuple(taylor.interval)
    return plan, taylor.order, set(plan) - set(rest[0].interval if rest else plan)  # type: ignore[attr-defined]


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
