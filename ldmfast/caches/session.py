"""The state of one call's cache for pictures that share their forwards: what networks ask at each segment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import LdmfastError
from .guard import GuardUse
from .policy import Action, Call, Judge, Policy
from .store import Store

Network = Callable[[Tensor], Tensor]
OUTSIDE = ("output", "guidance")  # segments that lie around the network; the others are in it


class Session:
    """Made for a call and let go with it; nothing of it is kept in the network, so calls never share features.

    Networks call value(), delta() and stack() with what they would compute; the sampler's side calls evaluate().
    """

    def __init__(self, policies: Sequence[Policy], call: Call) -> None:
        self.policies, self.call, self.store = tuple(policies), call, Store()
        self._policy: dict[str, Policy] = {}
        self._plan: dict[str, tuple[Action, ...]] = {}
        self._judges: dict[str, Judge] = {}
        if sum(p.parallel for p in self.policies) > 1:
            raise LdmfastError("two ParaStep decide about the order of the steps; give one of the two")
        for policy in self.policies:
            self._add(policy)
        self._last = {k: max((i for i, a in enumerate(plan) if a is not Action.COMPUTE), default=-1)
                      for k, plan in self._plan.items()}
        # with CFGCache rows of one branch are kept beside those of all that were computed before
        self._kept = {k: tuple(i < self._last[k] for i in range(call.steps)) if "guidance" in self._policy else
                      _kept(plan, self._policy[k].held) for k, plan in self._plan.items()}
        singles = [s for s in (p.single_from(call) for p in self.policies) if s is not None]
        self.single_from = min(singles, default=call.steps)
        guidance = self._plan.get("guidance", ())
        self.alone = self.single_from < call.steps or any(a is not Action.COMPUTE for a in guidance)  # ever
        inside = [type(self._policy[kind]).__name__ for kind in self._judges if kind not in OUTSIDE]
        if inside and "guidance" in self._policy:
            raise LdmfastError(f"{inside[0]} compares what all branches of guidance compute, of which CFGCache runs one"
                               " alone; give one of the two, or EasyCache or a cache with a plan beside CFGCache")
        self.branch = next((p.branch for p in self.policies if "deep" in p.kinds(call)), 0)
        self.step = 0
        self._merged = False
        self._branches = 1  # of what is held, for the one that the network computes
        self._rows: dict[tuple[tuple[int, ...], int, bool], Tensor] = {}
        self.evaluations = self.single_evaluations = 0
        self.computed: Counter[str] = Counter()
        self.reused: Counter[str] = Counter()
        self.forecast: Counter[str] = Counter()
        self.skipped: list[set[str]] = [set() for _ in call.times]

    @classmethod
    def of(cls, policies: Sequence[Policy], network: Any, times: Sequence[float]) -> Session | None:
        """For one call of a network that declares ``segments``; None without policies. Raises LdmfastError for
        policies that do not suit it or each other."""
        if not policies:
            return None
        skips = sum(len(block.resnets) for block in getattr(network, "up_blocks", ()))
        return cls(policies, Call(tuple(float(t) for t in times), network.segments, type(network).__name__, skips))

    def _add(self, policy: Policy) -> None:
        for kind in policy.kinds(self.call):
            if kind in self._policy:
                raise LdmfastError(f"{type(self._policy[kind]).__name__} and {type(policy).__name__} both decide about "
                                   f"{kind!r} segments; give one of the two")
            self._policy[kind] = policy
        self._plan |= policy.plan(self.call)
        judge = policy.judge(self.call)
        if judge is not None:
            self._judges[judge.kind] = judge

    # ---- the sampler's side

    def single(self, step: int) -> bool:
        """Whether this evaluation's network runs the conditional branch alone."""
        return self.ended(step) or ("guidance" in self._policy and self.store.steps("guidance", 0) != ()
                                    and self._plan["guidance"][step] is not Action.COMPUTE)

    def ended(self, step: int) -> bool:
        """Whether guidance has."""
        return step >= self.single_from

    def evaluate(self, network: Network, x: Tensor, step: int, branches: int = 1) -> Tensor:
        """network(x) at evaluation ``step``, or what stands for it. x: rows that are this call's own; with several
        branches of guidance, the conditional one's rows come last."""
        self.step = step
        if branches > 1 and self.ended(step):
            self._merge(branches)
            self.single_evaluations += 1
            return torch.cat([self._evaluate(network, x.chunk(branches)[-1])] * branches)
        if branches > 1 and "guidance" in self._policy:
            network = partial(self._guided, network, branches)
        return self._evaluate(network, x)

    def _guided(self, network: Network, branches: int, x: Tensor) -> Tensor:
        """All branches, computed; or the conditional one, and the others as far from it as they are expected to be."""
        action = self._action("guidance", 0)
        if action is Action.COMPUTE:
            *others, own = network(x).chunk(branches)
            self._keep("guidance", 0, (torch.cat(others) - torch.cat([own] * len(others)),))
            return torch.cat([*others, own])
        self.single_evaluations += 1
        self._branches = branches
        own = network(x.chunk(branches)[-1])
        self._branches = 1
        found = self._from_store("guidance", 0, action, torch.cat([own] * (branches - 1)))[0]
        assert found is not None
        return torch.cat([found, own])

    def _evaluate(self, network: Network, x: Tensor) -> Tensor:
        action = self._action("output", 0, x)
        vector = "output" in self._policy and self._policy["output"].vector
        if action is not Action.COMPUTE:
            found = self._from_store("output", 0, action, x if vector else None)[0]
            assert found is not None
            return found
        self.evaluations += 1
        y = network(x)
        if vector and y.shape != x.shape:
            raise LdmfastError(f"the network makes {tuple(y.shape)} of {tuple(x.shape)}, so output minus input cannot "
                               "be reused; give vector=False")
        if "output" in self._policy:
            self._keep("output", 0, (y - x if vector else y,), x, y)
        for kind, last in self._last.items():
            if self.step >= last:
                self.store.drop(kind)
        return y

    def restart(self) -> None:
        """Lets go of what is held; the next evaluation has rows of other branches."""
        for kind, policy in self._policy.items():
            self.store.drop(kind)
            judge = policy.judge(self.call) if kind in self._judges else None
            if judge is not None:
                judge.follow(self._judges[kind])
                self._judges[kind] = judge

    def _merge(self, branches: int) -> None:
        """Of what is held for all branches, prompt attention becomes the mean, the rest the conditional part."""
        if not self._merged:
            self._merged = True
            self.store.drop("guidance")
            for kind in self._judges:  # what they remember has rows of both branches
                self.store.drop(kind)
                judge = self._policy[kind].judge(self.call)
                assert judge is not None
                judge.follow(self._judges[kind])
                self._judges[kind] = judge
            self.store.map(lambda kind, x: (torch.stack(x.chunk(branches)).mean(0) if kind == "cross" else
                                            x.chunk(branches)[-1].clone()))

    def guards(self) -> list[GuardUse]:
        """What the guards among the policies have counted."""
        return [use for judge in self._judges.values() if (use := judge.use()) is not None]

    def holds(self) -> tuple[Any, ...]:
        """What of the policies decides the shapes of what is held, and where the network is cut."""
        return (self.branch, *((k, p.held, p.int8, p.vector) for k, p in sorted(self._policy.items())))

    def deciding(self) -> str:
        """The policies that decide during the call, by what the network computes; empty where all is known ahead."""
        return " and ".join(type(self._policy[kind]).__name__ for kind in self._judges)

    # ---- the network's side

    def value(self, kind: str, place: Hashable, compute: Callable[[], Any]) -> Any:
        """compute(), a tensor or a tuple of them, or what stands for it. The result is not to be written to."""
        action = self._action(kind, place)
        if action is not Action.COMPUTE:
            found = self._from_store(kind, place, action, None)
            return found if len(found) > 1 else found[0]
        y = compute()
        if kind in self._policy:
            self._keep(kind, place, y if isinstance(y, tuple) else (y,))
        return y

    def delta(self, kind: str, place: Hashable, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """compute(), which is x plus a residual, or x plus what stands for the residual."""
        action = self._action(kind, place)
        if action is not Action.COMPUTE:
            found = self._from_store(kind, place, action, x)[0]
            assert isinstance(found, Tensor)
            return found
        y = compute()
        if self._wants(kind):
            self._keep(kind, place, (y - x,))
        return y

    def stack(self, x: Tensor, whole: Callable[[], Tensor], first: Callable[[], Tensor],
              rest: Callable[[Tensor], Tensor], modulated: Callable[[], Tensor]) -> Tensor:
        """All blocks of a network: whole() is rest(first()). modulated: what the first block's first layer sees."""
        if "tail" in self._policy:
            h = first()
            return self._residual("tail", h, h - x, lambda: rest(h))
        if "stack" in self._policy:
            indicator = modulated() if "stack" in self._judges else x
            return self._residual("stack", x, indicator, whole)
        return whole()

    def _residual(self, kind: str, x: Tensor, indicator: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        action = self._action(kind, 0, indicator)
        if action is not Action.COMPUTE:
            found = self._from_store(kind, 0, action, x)[0]
            assert isinstance(found, Tensor)
            return found
        y = compute()
        if self._wants(kind):
            d = y - x
            self._keep(kind, 0, (d,), indicator, d)
        return y

    # ---- decisions

    def _action(self, kind: str, place: Hashable, indicator: Tensor | None = None) -> Action:
        action = Action.COMPUTE
        if kind in self._policy and self.store.steps(kind, place):
            judge = self._judges.get(kind)
            if judge is not None and indicator is not None:
                action = Action.COMPUTE if judge.needed(self.step, indicator) else Action.REUSE
            elif kind in self._plan:
                action = self._plan[kind][self.step]
        if kind in self._policy:
            (self.computed if action is Action.COMPUTE else
             self.reused if action is Action.REUSE else self.forecast)[kind] += 1
            if action is not Action.COMPUTE:
                self.skipped[self.step].add(kind)
        return action

    def decides(self, kind: str) -> bool:
        """Whether a policy decides about segments of this kind."""
        return kind in self._policy

    def reuses(self, kind: str, place: Hashable) -> Any:
        """The value held where this evaluation reuses it, else None; for segments that leave out more than their own
        computation."""
        action = self._action(kind, place)
        return None if action is Action.COMPUTE else self._from_store(kind, place, action, None)[0]

    def keep(self, kind: str, place: Hashable, value: Tensor) -> None:
        """A segment's value, computed because reuses() gave None."""
        if kind in self._policy:
            self._keep(kind, place, (value,))

    def _wants(self, kind: str) -> bool:
        # where a judge leaves blocks out, all have held text since the first step, and freeze together
        if kind in self._judges or (kind == "text" and self._judges):
            return True
        if kind not in self._plan:
            return False
        # one that is seen for the first time where it should be reused, as another cache left it out before, is kept
        return self._kept[kind][self.step] or self._plan[kind][self.step] is not Action.COMPUTE

    def _keep(self, kind: str, place: Hashable, value: tuple[Tensor | None, ...], indicator: Tensor | None = None,
              told: Tensor | None = None) -> None:
        judge = self._judges.get(kind)
        if judge is not None and indicator is not None and told is not None:
            judge.computed(self.step, indicator, told)
        if self._wants(kind):
            policy = self._policy[kind]
            if kind not in OUTSIDE and self._branches > 1:
                value = self._all_branches(value, self.store.get(kind, place))
            self.store.put(kind, place, self.step, value, policy.held, policy.int8)

    def _all_branches(self, value: tuple[Tensor | None, ...], before: tuple[Tensor | None, ...]
                      ) -> tuple[Tensor | None, ...]:
        """Of a segment computed for the conditional branch alone: the others follow it, as far from it as they were."""
        found: list[Tensor | None] = []
        for own, old in zip(value, before):
            if own is None or old is None:
                found.append(None)
                continue
            *others, last = old.chunk(self._branches)
            found.append(torch.cat([*(own + (x - last) for x in others), own]))
        return tuple(found)

    def _from_store(self, kind: str, place: Hashable, action: Action, base: Tensor | None) -> tuple[Tensor | None, ...]:
        """base (if any) plus the weighted sum of the values held."""
        steps = self.store.steps(kind, place)
        weights = [1.0] if action is Action.REUSE else self._policy[kind].weights(steps, self.step)
        values = [self.store.get(kind, place, i) for i in range(len(weights))]
        if self._branches > 1 and kind not in OUTSIDE:  # of what is held, the rows of the branch that runs
            values = [tuple(None if x is None else x.chunk(self._branches)[-1] for x in value) for value in values]
        if base is None and weights == [1.0]:
            return values[0]
        held = steps[:len(weights)]
        return tuple(None if parts[0] is None else self._combine((kind, place), held, weights, base, parts)
                     for parts in zip(*values))

    def _combine(self, where: tuple[str, Hashable], steps: tuple[int, ...], weights: list[float], base: Tensor | None,
                 parts: Any) -> Tensor:
        inputs = [*parts] if base is None else [base, *parts]
        key = (steps, self.step, base is None)
        if len(weights) == 1:
            key = ((), 0, base is None)  # a residual that is added as it is
        if key not in self._rows:
            row = weights if base is None else [1.0, *weights]
            self._rows[key] = torch.tensor([row], dtype=torch.float64, device=inputs[0].device)
        return ops.lincomb(self._rows[key], 0, inputs)


def _kept(plan: Sequence[Action], held: int) -> tuple[bool, ...]:
    """For each evaluation, whether a value computed then is used later: before ``held`` newer ones replace it."""
    kept = []
    for i in range(len(plan)):
        newer, used = 0, False
        for action in plan[i + 1:]:
            newer += action is Action.COMPUTE
            if newer >= held:
                break
            used = used or action is not Action.COMPUTE
        kept.append(used)
    return tuple(kept)
