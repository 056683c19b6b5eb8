"""Guard: a dynamic policy with a budget for what it may leave out of the pictures that share its forwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import LdmfastError
from .policy import Call, Judge, Policy, check_at_least


@dataclass(frozen=True)
class GuardUse:
    """Of a group of pictures that share forwards. limit: the budget. used: the sum of the indicator over the
    evaluations that were not computed, at most limit. forced: evaluations that were computed only for the guard."""

    limit: float
    used: float
    forced: int


@dataclass(frozen=True, kw_only=True)
class Guard(Policy):
    """``policy`` (FirstBlock, TeaCache or EasyCache) decides each evaluation; what its indicator says of every one that
    it leaves out is summed over the call, for each group of pictures that share forwards (in exact precision for each
    picture), and where the sum would pass ``limit`` the evaluation is computed in full.

    The indicator is the policy's own: the change since the last full evaluation that it holds against its threshold,
    an estimate of the relative error of what is reused. ``pipe.tune`` learns how the sum goes with the error of the
    finished picture, and sets limit by that. An infinite limit changes no bit of the policy, 0 computes always.
    ``out.report.guards`` tells what was used. Raises LdmfastError for a policy that does not measure as it goes.
    """

    policy: Policy
    limit: float
    dynamic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.policy, Mapping):  # as settings keep it
            from . import from_settings

            object.__setattr__(self, "policy", from_settings([self.policy])[0])
        if not isinstance(self.policy, Policy) or not self.policy.dynamic or isinstance(self.policy, Guard):
            raise LdmfastError(f"Guard(policy={self.policy!r}): only FirstBlock, TeaCache and EasyCache measure as "
                               "they go; of the others, what is left out is fixed by their own arguments")
        object.__setattr__(self, "int8", self.policy.int8)
        check_at_least(0, limit=self.limit)

    @property
    def branch(self) -> Any:
        return self.policy.branch

    @property
    def vector(self) -> Any:
        return self.policy.vector

    def kinds(self, call: Call) -> tuple[str, ...]:
        return self.policy.kinds(call)

    def judge(self, call: Call) -> Judge:
        inner = self.policy.judge(call)
        assert inner is not None
        return _Guarded(self, inner)

    def to_dict(self) -> dict[str, Any]:
        return {"name": "Guard", "policy": self.policy.to_dict(), "limit": self.limit}


class _Guarded(Judge):
    policy: Guard

    def __init__(self, policy: Guard, inner: Judge) -> None:
        super().__init__(policy)
        self.kind, self.inner = inner.kind, inner  # type: ignore[misc]
        self.used, self.forced = 0.0, 0

    def needed(self, step: int, indicator: Tensor) -> bool:
        if self.inner.needed(step, indicator):
            return True
        if not self.used + self.inner.value <= self.policy.limit:
            self.forced += 1
            return True
        self.used += self.inner.value
        return False

    def computed(self, step: int, indicator: Tensor, value: Tensor) -> None:
        self.inner.computed(step, indicator, value)

    def follow(self, before: Judge) -> None:
        assert isinstance(before, _Guarded)
        self.used, self.forced = before.used, before.forced

    def use(self) -> GuardUse:
        return GuardUse(self.policy.limit, self.used, self.forced)
