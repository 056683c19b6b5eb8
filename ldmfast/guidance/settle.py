"""The guidances of a call, of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from ..errors import LdmfastError
from . import check_guidance
from .cfg import CFG
from .guide import Guidance


def settle(given: Any, scale: float, implied: bool, rescale: float = 0.0) -> tuple[Guidance, ...]:
    """The guidances of a call. implied: guidance_scale says classifier-free guidance, unless one of those given stands
    in its place. A scale of 1 or less means no guidance, of such a one, too, unless it has a scale of its own. Raises
    LdmfastError for anything that is not a guidance, or says something twice."""
    found = check_guidance(given)
    base = next((g for g in found if g.base), None)
    if base is None:
        return (CFG(rescale=rescale), *found) if implied else found
    if rescale and getattr(base, "rescale", 0.0):
        raise LdmfastError(f"guidance_rescale={rescale:g} and rescale={getattr(base, 'rescale', 0.0):g} of the "
                           "guidance were both given; give one of the two")
    changed: dict[str, float] = {"rescale": rescale} if rescale else {}
    if getattr(base, "scale", scale) is None and scale <= 1:
        changed["scale"] = 1.0
    return tuple(replace(cast(Any, g), **changed) if g is base and changed else g for g in found)


def check_suits(network: Any, guidance: Sequence[Guidance], conditional: bool, embedded: bool) -> None:
    """Raises LdmfastError for a guidance that this network has no use for."""
    for one in guidance:
        if one.base and not conditional:
            raise LdmfastError(f"{type(one).__name__} needs a condition, and this call has no prompt: leave it out")
        if one.base and embedded:
            raise LdmfastError(f"{type(one).__name__}: this network is told its guidance scale as an input: give "
                               "guidance_scale alone")
        one.check(network)
