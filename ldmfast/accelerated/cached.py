"""Caches in the calls of a diffusers pipeline: every call has sessions of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..caches import CacheReport, Policy, Session, check_cache
from ..errors import LdmfastError
from ..models import FluxTransformer2D

CACHE = "_ldmfast_cache"  # in the attributes of a pipeline: its policies
_current: ContextVar[Run | None] = ContextVar("run", default=None)


def checked(cache: Any, obj: Any, networks: Sequence[nn.Module | None]) -> tuple[Policy, ...]:
    """The policies, which suit all denoisers among a pipeline's networks and need not know one branch of guidance from
    another. Raises LdmfastError."""
    natives = [network for network in networks if hasattr(network, "segments")]
    if isinstance(obj, nn.Module) or not natives or not hasattr(obj, "scheduler"):
        raise LdmfastError("cache= needs a diffusers pipeline whose denoiser runs on ldmfast, and its scheduler: a "
                           "cache lasts one call, and only a pipeline's has a beginning and an end")
    times = [float(t) for t in range(1000, 0, -20)]
    found = check_cache(cache, natives[0], times)
    for native in natives:
        session = Session.of(found, native, times)
        if (session is not None and session.alone) or any(p.parallel for p in found):
            raise LdmfastError(f"cache={cache!r} runs one branch of guidance alone, or steps in an order of its own, "
                               "which diffusers' pipelines do not know of: use ldmfast.Pipeline, or "
                               "TGate(single=False)")
    return found


class Run:
    """One call of a pipeline. Its sessions, by network, shape, and how many forwards the pipeline has asked for at the
    same step (guidance that is not one batch)."""

    def __init__(self, policies: Sequence[Policy], scheduler: Any) -> None:
        self.policies, self.scheduler = policies, scheduler
        self.times: list[float] = []
        self.sessions: dict[tuple[Any, ...], Session] = {}
        self.done: list[Session] = []
        self.last, self.number = -1, 0

    def session(self, native: Any, sample: Tensor, t: float) -> tuple[Session, int]:
        """And the number of the evaluation: the schedule's time that is nearest, of equal ones the next."""
        if not self.times:
            scale = 1e-3 if isinstance(native, FluxTransformer2D) else 1.0  # what diffusers' pipelines tell it
            self.times = [float(x) * scale for x in self.scheduler.timesteps]
            if not self.times:
                raise LdmfastError("its scheduler has no timesteps, by which a cache finds the evaluation")
        away = [abs(x - t) for x in self.times]
        same = [i for i, x in enumerate(away) if x == min(away)]
        later = [i for i in same if i > self.last]
        if later:
            self.last, self.number = later[0], 0
        elif self.last in same:
            self.number += 1
        else:  # a second pass over the schedule
            self.sessions.clear()
            self.last, self.number = same[0], 0
        key = id(native), tuple(sample.shape), self.number
        if key not in self.sessions:
            session = Session.of(self.policies, native, self.times)
            assert session is not None
            self.sessions[key] = session
            self.done.append(session)
        return self.sessions[key], self.last


class Cached:
    """Stands for a native denoiser in a call that has a cache."""

    def __init__(self, native: Any, run: Run) -> None:
        self.native, self.run, self.dtype = native, run, native.dtype

    def __call__(self, sample: Tensor, timestep: Any, **given: Any) -> Tensor:
        session, step = self.run.session(self.native, sample, float(torch.as_tensor(timestep).flatten()[0]))

        def network(rows: Tensor) -> Tensor:
            return self.native(rows, timestep, **given, cache=session)

        y = session.evaluate(network, sample.to(self.dtype), step)
        return y.clone() if session.decides("output") else y  # what is held is not the pipeline's to write to


def within_run(native: Any) -> Any:
    """A denoiser as the call of this thread wants it."""
    run = _current.get()
    return native if run is None or not hasattr(native, "segments") else Cached(native, run)


@contextmanager
def running(pipe: Any) -> Iterator[Run | None]:
    """For one call of a pipeline, which is one thread's."""
    policies = vars(pipe).get(CACHE)
    run = Run(policies, pipe.scheduler) if policies else None
    token = _current.set(run)
    try:
        yield run
    finally:
        _current.reset(token)


def reported(run: Run | None, out: Any) -> Any:
    """A pipeline's output with its cache's report, where it is an object."""
    if run is not None and hasattr(out, "__dict__"):
        object.__setattr__(out, "report", CacheReport.of(run.done))
    return out
