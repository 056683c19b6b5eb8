"""Guidance: how several predictions of an evaluation become one.

``pipe(prompt, guidance=CFG(scale=5, sigmas=(0.3, 4)))``; several as a list, of which at most one stands in the place
of classifier-free guidance. ``guidance_scale`` alone is ``CFG()``. docs/guidance.md compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LdmfastError
from .apg import APG
from .autoguidance import AutoGuidance
from .cfg import CFG
from .cfg_zero import CFGZero
from .compose import Compose, mixture, product, united
from .energy import Classifier, Energy
from .guide import COND, EXTRA, UNCOND, Branch, Call, Guidance, Plan
from .minority import Minority
from .pag import PAG
from .sag import SAG
from .seg import SEG
from .skip_layer import SkipLayer
from .tangential import TangentialCFG

GUIDANCES: dict[str, type[Guidance]] = {g.__name__: g for g in (
    APG, CFG, CFGZero, PAG, SAG, SEG, AutoGuidance, Classifier, Compose, Energy, Minority, SkipLayer, TangentialCFG)}

__all__ = ["COND", "EXTRA", "GUIDANCES", "UNCOND", "Branch", "Call", "Guidance", "Plan", "check_guidance",
           "from_settings", "mixture", "product", "repeatable", "united", *GUIDANCES]


def check_guidance(guidance: Any) -> tuple[Guidance, ...]:
    """What a call's ``guidance`` argument holds: None, one, or several. Raises LdmfastError for anything else."""
    several = isinstance(guidance, Sequence) and not isinstance(guidance, str)
    found = () if guidance is None else tuple(guidance) if several else (guidance,)
    for one in found:
        if not isinstance(one, Guidance):
            raise LdmfastError(f"guidance={one!r} is not a guidance: give one of ldmfast.guidance, which are "
                               f"{', '.join(GUIDANCES)}, or guidance_scale alone")
    return found


def repeatable(guidance: Sequence[Guidance]) -> bool:
    """Whether ``from_settings`` finds these again: they are ours, and hold nothing but numbers and names."""
    return all(type(one) in GUIDANCES.values() and one.plain for one in guidance)


def from_settings(rows: Sequence[Mapping[str, Any]] | None) -> tuple[Guidance, ...]:
    """Guidances from what ``Guidance.to_dict`` made of them, as a PNG's settings keep it. Raises LdmfastError for a
    name or a field that is not known."""
    found = []
    for row in rows or ():
        try:
            values = dict(row)
            found.append(GUIDANCES[values.pop("name")](**values))
        except (KeyError, TypeError, ValueError) as error:
            raise LdmfastError(f"the settings name a guidance {row!r}, which this version does not have") from error
    return tuple(found)
