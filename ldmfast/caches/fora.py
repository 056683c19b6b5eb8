"""FORA: attention and feed-forward outputs, at a fixed interval."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Call, Interval, Plan, Policy, actions, check_interval, computed_steps

LAYERS = ("self", "cross", "mlp", "single")


@dataclass(frozen=True, kw_only=True)
class FORA(Policy):
    """Every attention and every feed-forward is computed at each ``interval``-th evaluation and reused at the others;
    norms, modulation and gates always run (Selvaraju et al. 2024, "FORA: Fast-Forward Caching in Diffusion Transformer
    Acceleration", section 3.2). In a UNet the ResNet blocks run, too.

    interval: a whole number, or the rising list of the evaluations to compute, which starts with 0.
    """

    interval: Interval = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", check_interval("interval", self.interval))

    def kinds(self, call: Call) -> tuple[str, ...]:
        return self._of(call, LAYERS, "attention and feed-forward outputs")

    def plan(self, call: Call) -> Plan:
        return dict.fromkeys(self.kinds(call), actions(computed_steps(self.interval, call.steps)))
