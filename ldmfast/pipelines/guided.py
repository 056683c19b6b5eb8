"""The forwards of an evaluation: those of its branches that one network can share are one batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..caches import Policy, Session
from ..guidance import COND, Branch, Plan
from ..guidance.guide import At, Source
from ..guidance.perturb import by_branch
from ..models.hooks import Hooks

Index = Any  # what picks a group's pictures: a slice, or a tensor of numbers
Prepare = Callable[[Any, Sequence[str], int, list[float]], Any]


@dataclass(eq=False)
class Forward:
    """Branches that are one batch, in this order. Of each group of pictures: its network, states of all branches, and
    of the last alone where a cache may run it so. cached: a cache may stand in for parts of it."""

    branches: tuple[Branch, ...]
    networks: list[Any]
    states: list[Any]
    alone: list[Any]
    cached: bool
    hooks: list[Hooks | None]

    @property
    def source(self) -> Source | None:
        """What makes the x of these branches of another one's prediction."""
        return self.branches[0].source


class Guided:
    """What the denoisers share: groups of pictures with a network each, and of each evaluation the forwards.

    prepare(network, conditions of the branches, group, times) makes a network's state.
    """

    extra: Tensor | None
    dtype: torch.dtype

    def __init__(self, plan: Plan, networks: Sequence[Any], groups: Sequence[Index], times: Sequence[float],
                 prepare: Prepare, cache: Sequence[Policy]) -> None:
        self.plan, self.unets, self.groups = plan, list(networks), list(groups)
        self.memory: dict[int, dict[str, Any]] = {}
        self.seen: list[dict[Source, Tensor]] = [{} for _ in self.groups]
        self.sessions = [Session.of(cache, unet, times) for unet in self.unets]
        active = [plan.active(stage) for stage in range(len(times))]
        shared: dict[tuple[Branch, ...], list[float]] = {}
        for t, branches in zip(times, active):
            for some in together(branches):
                shared.setdefault(some, []).append(self._time(some[0].source, float(t)))
        made = {some: self._forward(some, list(dict.fromkeys(own)), prepare)
                for some, own in shared.items()}
        self.forwards = [[made[some] for some in together(branches)] for branches in active]
        self._last: Forward | None = None

    def restart(self) -> None:
        """Forgets what a run has left: the next evaluation is the first of another one. Without a cache."""
        self.memory = {}
        self._last = None
        for seen in self.seen:
            seen.clear()

    def _forward(self, branches: tuple[Branch, ...], times: list[float], prepare: Prepare) -> Forward:
        other, skip = branches[0].network, branches[0].skip
        networks = [other or unet for unet in self.unets]
        conditions = [b.condition for b in branches]
        states = [prepare(unet, conditions, g, times) for g, unet in enumerate(networks)]
        alone = [None if s is None or not s.alone or len(branches) == 1 else
                 prepare(unet, conditions[-1:], g, times) for g, (s, unet) in enumerate(zip(self.sessions, networks))]
        cached = other is None and not skip and branches[0].source is None
        return Forward(branches, networks, states, alone, cached, [])

    def evaluate(self, x: Tensor, shown: Tensor, t: float, stage: int) -> Any:
        """x: what is sampled, as the network is shown it. shown: with all that the network sees beside it, in its
        dtype. t: the network's time. The denoiser's answer."""
        outs: dict[Branch, Tensor] = {}
        for forward in self.forwards[stage]:
            if forward.cached:
                self._restart_before(forward)
            if not forward.hooks:
                size = (int(x.shape[-2]), int(x.shape[-1]))
                forward.hooks = [self._hooks(forward.branches, g, n, size) for g, n in enumerate(forward.networks)]
            source, own, time = forward.source, shown, t
            if source is not None:
                seen = [s[source] for s in self.seen if source in s]
                at = At(stage, self.plan.call, x, {})
                looked = self.ordered(torch.cat(seen)) if seen else None
                own = self.shown(source.shown(x, outs[source.of], looked, at), self.extra)
                time = self._time(source, t)
            networks = [partial(self._network, forward, g, time, stage) for g in range(len(self.groups))]
            found = self.batch(own, len(forward.branches), networks)
            outs |= zip(forward.branches, found if forward.cached else [y.to(self.dtype) for y in found])
        return self.plan.outputs(outs, stage, x, self.memory)

    def _time(self, source: Source | None, t: float) -> float:
        """The network's time of a branch; a source may have one of its own, in the schedule's time."""
        own = t if source is None else source.time(t)
        return t if own == t else self.network_time(own)

    def _hooks(self, branches: Sequence[Branch], group: int, network: Any, size: tuple[int, int]) -> Hooks | None:
        """What changes in the network: perturbed attention, attention that is looked at, and blocks left out."""
        sources = [b.source for b in self.plan.branches if b.source is not None and b.source.of in branches]
        sources = [] if branches[0].apart != COND.apart else sources
        watched = [s for s in sources if s.place(network) is not None]
        skip = branches[0].skip
        if not skip and not watched and all(b.perturb is None for b in branches):
            return None
        by_place: dict[int, list[Any]] = {}
        for i, branch in enumerate(branches):
            for place in () if branch.perturb is None else branch.perturb.places(network):
                by_place.setdefault(place, [None] * len(branches))[i] = branch.perturb.attend  # type: ignore[union-attr]
        for source in watched:
            looked_at = source.place(network)
            assert looked_at is not None
            own = by_place.setdefault(looked_at, [None] * len(branches))
            own[branches.index(source.of)] = source.spy(partial(self.seen[group].__setitem__, source))
        return Hooks({place: by_branch(own, size) for place, own in by_place.items()}, frozenset(skip))

    def _restart_before(self, forward: Forward) -> None:
        """What a cache holds has rows of the branches that were evaluated together, and is of no use to others."""
        for session in self.sessions if self._last not in (None, forward) else ():
            if session is not None:
                session.restart()
        self._last = forward

    def _network(self, forward: Forward, group: int, t: float, stage: int, rows: Tensor) -> Any:
        unet, state, hooks = forward.networks[group], forward.states[group], forward.hooks[group]
        session = self.sessions[group] if forward.cached else None
        if session is not None and forward.alone[group] is not None and session.single(stage):
            state, hooks = forward.alone[group], None
        network = partial(unet, timestep=t, state=state) if hooks is None else partial(
            unet, timestep=t, state=state, hooks=hooks)
        if session is None:
            return network(rows)
        return session.evaluate(partial(network, cache=session), rows, stage, len(forward.branches))

    def batch(self, x: Tensor, branches: int, networks: Sequence[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """Of every branch the predictions of all pictures. networks: that of each group of pictures, its time and
        conditions filled in."""
        parts = [self.trimmed(network(torch.cat([x[group]] * branches))).chunk(branches)
                 for group, network in zip(self.groups, networks)]
        return [self.ordered(p[0] if len(parts) == 1 else torch.cat(p)) for p in zip(*parts)]

    def shown(self, x: Tensor, extra: Tensor | None) -> Tensor:
        """x with all that the network sees beside it, in its dtype."""
        raise NotImplementedError

    def network_time(self, t: float) -> float:
        """What the network is told for the scheduler's time."""
        return t

    def trimmed(self, y: Tensor) -> Tensor:
        """Of what a network gives, the prediction."""
        return y

    def ordered(self, y: Tensor) -> Tensor:
        """The pictures of all groups, in the call's order."""
        return y


def together(branches: Sequence[Branch]) -> list[tuple[Branch, ...]]:
    """The branches by forwards: first what shares one with the conditional, then by themselves, last what is made of
    another's prediction."""
    lots: dict[Hashable, list[Branch]] = {}
    for branch in sorted(branches, key=lambda b: (b.source is not None, b.apart != COND.apart)):
        lots.setdefault(branch.apart, []).append(branch)
    return [tuple(lot) for lot in lots.values()]
