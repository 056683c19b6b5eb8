"""Keys and values of the prompt, across evaluations."""

from __future__ import annotations

from dataclasses import dataclass

from .policy import Call, Interval, Plan, Policy, actions, check_interval, computed_steps


@dataclass(frozen=True, kw_only=True)
class PromptKV(Policy):
    """In a joint transformer (SD 3, FLUX) the prompt's tokens go through every block beside the picture's. Here they do
    so at each ``interval``-th evaluation only; at the others the picture attends to the keys and values that they had,
    and nothing of the text stream runs.

    In UNets and PixArt the prompt's keys and values do not depend on the evaluation: they are computed once a call
    without any cache, so the policy changes nothing there. interval: as FORA's.
    """

    interval: Interval = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "interval", check_interval("interval", self.interval))

    def kinds(self, call: Call) -> tuple[str, ...]:
        return ("text",) if "cross" in call.segments else self._of(call, ("text",), "a prompt's keys and values")

    def plan(self, call: Call) -> Plan:
        return {"text": actions(computed_steps(self.interval, call.steps))}
