"""The forwards of an evaluation: those of its branches that one network can share are one batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..caches import Policy, Session
from ..guidance import Branch, Plan
from ..guidance.perturb import by_branch
from ..models.hooks import Hooks

Index = Any  # what picks a group's pictures: a slice, or a tensor of numbers
Prepare = Callable[[Any, Sequence[str], int, list[float]], Any]


@dataclass(eq=False)
class Forward:
    """Branches that are one batch, in this order. Of each group of pictures: its network, states of all branches, and
    of the last alone where a cache ends guidance. cached: a cache may stand in for parts of it."""

    branches: tuple[Branch, ...]
    networks: list[Any]
    states: list[Any]
    alone: list[Any]
    cached: bool
    hooks: list[Hooks | None]


class Guided:
    """What the denoisers share: groups of pictures with a network each, and of each evaluation the forwards.

    prepare(network, conditions of the branches, group, times) makes a network's state.
    """

    extra: Tensor | None

    def __init__(self, plan: Plan, networks: Sequence[Any], groups: Sequence[Index], times: Sequence[float],
                 prepare: Prepare, cache: Sequence[Policy]) -> None:
        self.plan, self.unets, self.groups = plan, list(networks), list(groups)
        self.memory: dict[int, dict[str, Any]] = {}
        self.sessions = [Session.of(cache, unet, times) for unet in self.unets]
        active = [plan.active(stage) for stage in range(len(times))]
        shared: dict[tuple[Branch, ...], list[float]] = {}
        for t, branches in zip(times, active):
            for some in together(branches):
                shared.setdefault(some, []).append(float(t))
        if not shared:
            shared = {some: [] for some in together(plan.branches)}
        made = {some: self._forward(some, list(dict.fromkeys(own)), prepare, len(times))
                for some, own in shared.items()}
        self.forwards = [[made[some] for some in together(branches)] for branches in active]
        first = next(iter(made.values()))
        self.branches, self.states = len(first.branches), first.states
        self._last: Forward | None = None

    def _forward(self, branches: tuple[Branch, ...], times: list[float], prepare: Prepare, stages: int) -> Forward:
        other, skip = branches[0].network, branches[0].skip
        networks = [other or unet for unet in self.unets]
        conditions = [b.condition for b in branches]
        states = [prepare(unet, conditions, g, times) for g, unet in enumerate(networks)]
        alone = [None if s is None or not 0 < s.single_from < stages or len(branches) == 1 else
                 prepare(unet, conditions[-1:], g, times) for g, (s, unet) in enumerate(zip(self.sessions, networks))]
        hooks = [_hooks(branches, unet, skip) for unet in networks]
        return Forward(branches, networks, states, alone, other is None and not skip, hooks)

    def evaluate(self, x: Tensor, shown: Tensor, t: float, stage: int) -> Any:
        """x: what is sampled, as the network is shown it. shown: with all that the network sees beside it, in its
        dtype. t: the network's time. The denoiser's answer."""
        outs: dict[Branch, Tensor] = {}
        for forward in self.forwards[stage]:
            if forward.cached:
                self._restart_before(forward)
            networks = [partial(self._network, forward, g, t, stage) for g in range(len(self.groups))]
            outs |= zip(forward.branches, self.batch(shown, len(forward.branches), networks))
        return self.plan.outputs(outs, stage, x, self.memory)

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

    def trimmed(self, y: Tensor) -> Tensor:
        """Of what a network gives, the prediction."""
        return y

    def ordered(self, y: Tensor) -> Tensor:
        """The pictures of all groups, in the call's order."""
        return y


def together(branches: Sequence[Branch]) -> list[tuple[Branch, ...]]:
    """The branches by forwards, in the order of the first of each."""
    lots: dict[Hashable, list[Branch]] = {}
    for branch in branches:
        lots.setdefault(branch.apart, []).append(branch)
    return [tuple(lot) for lot in lots.values()]


def _hooks(branches: Sequence[Branch], network: Any, skip: Sequence[int]) -> Hooks | None:
    if not skip and all(b.perturb is None for b in branches):
        return None
    places = [b.perturb.places(network) if b.perturb is not None else frozenset() for b in branches]
    attend = {place: by_branch([b.perturb.attend if b.perturb is not None and place in own else None
                                for b, own in zip(branches, places)])
              for place in frozenset().union(*places)}
    return Hooks(attend, frozenset(skip))
