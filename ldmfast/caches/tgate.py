"""T-GATE: prompt attention frozen after a step."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Action, Call, Plan, Policy, check_whole


@dataclass(frozen=True, kw_only=True)
class TGate(Policy):
    """After ``gate`` evaluations the outputs of all prompt attentions stay what they were at the last of them (Zhang et
    al. 2024, "Cross-Attention Makes Inference Cumbersome in Text-to-Image Diffusion Models", section 4).

    single: the paper's: with classifier-free guidance, what is frozen is the mean of both branches, and later
    evaluations run one branch only, so guidance ends. False keeps guidance, each branch with its own.
    """

    gate: int = 10
    single: bool = True

    def __post_init__(self) -> None:
        check_whole(1, gate=self.gate)

    def kinds(self, call: Call) -> tuple[str, ...]:
        return self._of(call, ("cross",), "the outputs of prompt attention")

    def plan(self, call: Call) -> Plan:
        return {"cross": tuple(Action.COMPUTE if i < self.gate else Action.REUSE for i in range(call.steps))}

    def single_from(self, call: Call) -> int | None:
        return self.gate if self.single else None
