"""DeepCache: the deep part of a UNet, behind one of its skip connections."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Call, Interval, Plan, Policy, actions, check_branch, check_interval, computed_steps


@dataclass(frozen=True, kw_only=True)
class DeepCache(Policy):
    """Between computed evaluations only what lies above one skip connection runs; what comes from below it is the last
    one's (Ma et al. 2023, "DeepCache: Accelerating Diffusion Models for Free", section 3.2, equation 8).

    interval: every so many evaluations everything is computed (their N); or the rising list of those, which starts
    with 0 (their non-uniform 1:N). branch: the skip connection, from 0, the outermost, whose shallow part is the input
    convolution and the last up layer. UNets only.
    """

    interval: Interval = 3
    branch: int = 0  # type: ignore[misc]

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", check_interval("interval", self.interval))

    def kinds(self, call: Call) -> tuple[str, ...]:
        found = self._of(call, ("deep",), "what lies behind a UNet's skip connections")
        check_branch(call, self.branch)
        return found

    def plan(self, call: Call) -> Plan:
        return {"deep": actions(computed_steps(self.interval, call.steps))}
