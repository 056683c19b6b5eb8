"""What tune tries: single changes first, then their combinations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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


def singles(pipe: Pipeline, reference: Settings, made: dict[str, Any], names: Sequence[str],
            products: tuple[np.ndarray, np.ndarray] | None) -> list[Candidate]:
    """Settings that differ from the reference in one respect: precision, solver with steps, or cache."""
    found = [dataclasses.replace(reference, precision=name) for name in names]
    steps = int(made["num_inference_steps"])
    own = [made["solver"]] if made["solver"] in ("ddim", "euler", "flow_euler", "dpmpp_2m", "unipc") else []
    for solver in dict.fromkeys([*own, "dpmpp_2m", "unipc"]):
        for count in sorted({max(2, round(steps * share)) for share in SHARES}, reverse=True):
            if reference.timesteps is None and count < steps:
                found.append(dataclasses.replace(reference, solver=solver, steps=count))
    if not reference.cache:
        found += [dataclasses.replace(reference, cache=cache) for cache in caches(pipe, products, steps)]
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


def combinations(measure: Measure, reference: Settings, measured: Sequence[Candidate]) -> list[Candidate]:
    """Pairs of single changes that should keep the promise, placed forecasts with a deep cache between, and guarded
    dynamic caches with the limits learnt."""
    cheap = [c for c in measured if c.settings.precision != reference.precision and not c.settings.cache]
    cached = [c for c in measured if c.settings.cache and not _guarded(c.settings)]
    solvers = [c for c in measured if not c.settings.cache and c.settings.precision == reference.precision]
    even = [c for c in cached if isinstance(c.settings.cache[0], DeepCache)]
    found = combine(measure, cheap, [*cached, *solvers], _joined, COMBINED)
    found += combine(measure, solvers, even, _joined, 3)
    for c in sorted(cached, key=lambda c: -c.speed):
        (policy,) = c.settings.cache
        if len(found) >= 2 * COMBINED:
            break
        if not even or c.mean < measure.limit:
            continue
        if isinstance(policy, TaylorSeer) and policy.on == "output" and not isinstance(policy.interval, int):
            plan = tuple(policy.interval)
            # deep is every other one; or all but the last and the third from last
            for computed in dict.fromkeys((plan[::2], (*plan[:-3], plan[-2]))) if len(plan) > 3 else ():
                for precision in dict.fromkeys([reference.precision, *(p.settings.precision for p in cheap)]):
                    found.append(Candidate(dataclasses.replace(
                        c.settings, precision=precision, cache=(policy, DeepCache(interval=computed)))))
    for c in measured:
        limit = guard_limit(measure, c) if _guarded(c.settings) else None
        if limit is not None:
            guard = c.settings.cache[0]
            assert isinstance(guard, Guard)
            found.append(Candidate(dataclasses.replace(c.settings, cache=(Guard(policy=guard.policy, limit=limit),))))
    return found


def _joined(a: Settings, b: Settings) -> Settings | None:
    """b with a's precision, solver and cache where b has none of its own."""
    if a.cache and b.cache:
        return None
    solver = a if a.solver is not None else b
    return dataclasses.replace(b, precision=a.precision, solver=solver.solver, steps=solver.steps,
                               cache=a.cache or b.cache)


def _guarded(settings: Settings) -> bool:
    return any(isinstance(p, Guard) for p in settings.cache)
