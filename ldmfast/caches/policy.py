"""What every cache policy answers: for each evaluation and each kind of segment, compute, reuse or forecast."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..errors import LdmfastError

if TYPE_CHECKING:
    from .guard import GuardUse


class Action(Enum):
    """COMPUTE: the segment runs. REUSE: its last value stands in. FORECAST: a combination of its last values does."""

    COMPUTE = "compute"
    REUSE = "reuse"
    FORECAST = "forecast"


Plan = Mapping[str, tuple[Action, ...]]


@dataclass(frozen=True)
class Call:
    """What is known before the first evaluation. times: the network's time of every evaluation. segments: kinds that
    the network declares. network: its name, for messages. skips: a UNet's skip connections."""

    times: tuple[float, ...]
    segments: tuple[str, ...]
    network: str
    skips: int = 0

    @property
    def steps(self) -> int:
        return len(self.times)


class Judge:
    """Decides one kind of segment as the call goes on, from an indicator tensor. One for each session."""

    kind: ClassVar[str]
    value: float = 0.0  # of the indicator: what needed() has just held against the threshold

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def needed(self, step: int, indicator: Tensor) -> bool:
        """Whether the segment is to be computed; a value to reuse is there."""
        raise NotImplementedError

    def computed(self, step: int, indicator: Tensor, value: Tensor) -> None:
        """Told what was computed: the network's output for kind "output", the residual for others."""

    def follow(self, before: Judge) -> None:
        """Takes over from the judge of the same call's first part, whose tensors had other rows."""

    def use(self) -> GuardUse | None:
        """What a guard has counted."""
        return None


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of the policies: frozen settings, shared by any number of calls.

    int8: hold values in 8 bits with a scale for each row of channels (``ops.quantize_rowwise``): a quarter of the
    memory in fp32, at a relative error of about 0.4% of a row's largest number.
    """

    int8: bool = False

    dynamic: ClassVar[bool] = False  # decides during the call, from tensors
    branch: ClassVar[Any] = 0  # of "deep": the skip connection behind which it lies
    vector: ClassVar[Any] = False  # of "output": what is held is output minus input
    parallel: ClassVar[bool] = False  # takes the steps in an order of its own

    @property
    def held(self) -> int:
        """Values of one segment that are kept."""
        return 1

    def kinds(self, call: Call) -> tuple[str, ...]:
        """The kinds of segments that this policy decides about. Raises LdmfastError for a network without them."""
        raise NotImplementedError

    def plan(self, call: Call) -> Plan:
        """The actions of every evaluation, for each kind. Dynamic policies answer through judge()."""
        return {}

    def judge(self, call: Call) -> Judge | None:
        return None

    def weights(self, steps: Sequence[int], step: int) -> list[float]:
        """Coefficients of the values held, the newest first, computed at ``steps``, for evaluation ``step``."""
        return [1.0]

    def single_from(self, call: Call) -> int | None:
        """The first evaluation that runs without the unconditional branch of guidance, None for none."""
        return None

    def critical_path(self, evaluations: int) -> int:
        """How many of the evaluations come one after another, if those that need not wait run at once."""
        return evaluations

    def to_dict(self) -> dict[str, Any]:
        return {"name": type(self).__name__, **dataclasses.asdict(self)}

    def _of(self, call: Call, wanted: tuple[str, ...], what: str) -> tuple[str, ...]:
        found = tuple(k for k in wanted if k in call.segments)
        if not found:
            raise LdmfastError(f"{type(self).__name__} reuses {what}, which a {call.network} does not have; use "
                               "another cache, for instance TaylorSeer(on='output')")
        return found


def check_branch(call: Call, branch: int) -> None:
    """Raises LdmfastError for a skip connection that the network does not have."""
    if not isinstance(branch, int) or not 0 <= branch < call.skips:
        raise LdmfastError(f"branch={branch!r}: this {call.network} has skip connections 0 to {call.skips - 1}")


Interval = int | Sequence[int]


def check_interval(name: str, interval: Any) -> Interval:
    """An int of at least 1, or the steps that are computed, which start at 0. Raises LdmfastError."""
    if isinstance(interval, int) and not isinstance(interval, bool) and interval >= 1:
        return interval
    if isinstance(interval, (list, tuple)):
        steps = tuple(interval)
        if steps and steps[0] == 0 and all(isinstance(s, int) for s in steps) and list(steps) == sorted(set(steps)):
            return steps
    raise LdmfastError(f"{name}={interval!r} is neither a whole number of at least 1 nor the rising list of the steps "
                       "to compute, which starts with 0")


def check_at_least(least: float, **values: Any) -> None:
    """Raises LdmfastError for a value that is not a number of at least ``least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
            raise LdmfastError(f"{name}={value!r} must be a number of at least {least:g}")


def check_whole(least: int, **values: Any) -> None:
    """Raises LdmfastError for a value that is not a whole number of at least ``least``."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise LdmfastError(f"{name}={value!r} must be a whole number of at least {least}")


def check_numbers(name: str, values: Any, count: int | None = None) -> tuple[float, ...]:
    """The numbers of a list, ``count`` of them if that is given, else one or more. Raises LdmfastError."""
    try:
        found = () if isinstance(values, str) else tuple(float(v) for v in values)
    except (TypeError, ValueError):
        found = ()
    if not found or count not in (None, len(found)) or any(v != v for v in found):
        raise LdmfastError(f"{name}={values!r} must be a list of {'numbers' if count is None else f'{count} numbers'}")
    return found


def computed_steps(interval: Interval, steps: int, first: int = 1, last: int = 0) -> list[bool]:
    """Which evaluations are computed: the first ``first`` and the last ``last``, and between them every
    ``interval``-th, counted from the end of the first; or exactly those listed."""
    if not isinstance(interval, int):
        return [s in interval for s in range(steps)]
    first = max(first, 1)
    return [s < first or (s - first + 1) % interval == 0 or s >= steps - last for s in range(steps)]


def actions(computed: Sequence[bool], other: Action = Action.REUSE) -> tuple[Action, ...]:
    return tuple(Action.COMPUTE if c else other for c in computed)
