"""A call of any pipeline, opened: its networks with their conditions, its noise and step table, for another loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..caches import ParaStep
from ..errors import LdmfastError
from ..samplers import StepTable
from ..samplers.sample import Denoiser, Generators

if TYPE_CHECKING:
    from .pipeline import Pipeline

# what a call does beside its loop: "settings" may send it to another pipeline, the others change states between steps
_BESIDE = ("settings", "mask_image", "callback_on_step_end")


@dataclass(frozen=True)
class OpenCall:
    """What the sampling loop of a call is given. x: the state at the start. table: guidance is folded in. denoise: as
    ``samplers.sample`` wants it; it knows the network times of this table alone."""

    denoise: Denoiser
    x: Tensor
    table: StepTable
    generator: Generators


class _Loop:
    """Stands where a GPU pipeline has its engine: is given the loop of a call, keeps it, and ends it at once."""

    def __init__(self) -> None:
        self.found: OpenCall | None = None

    def sample(self, denoiser: Denoiser, x: Tensor, *, table: StepTable, generator: Generators = None, **_: Any
               ) -> Tensor:
        self.found = OpenCall(denoiser, x, table, generator)
        return x

    def call(self, *_: Any) -> None:
        return None


def open_call(pipe: Pipeline, *prompt: Any, **arguments: Any) -> OpenCall:
    """The loop that ``pipe(*prompt, **arguments)`` would run, checked and completed as that call is.

    In exact precision a call gives each picture forwards of its own, so that its bits depend on nothing else; here
    pictures share them, which is faster and the same but for rounding. Raises LdmfastError for what is no part of the
    loop's table and denoiser: settings, mask_image, callback_on_step_end, and the cache ParaStep."""
    cache = arguments.get("cache")
    named = [name for name in _BESIDE if arguments.get(name) is not None]
    named += ["ParaStep" for p in (cache if isinstance(cache, (list, tuple)) else [cache]) if isinstance(p, ParaStep)]
    if named:
        raise LdmfastError(f"open_call: {named[0]} has no place in a loop of one's own; leave it out")
    opened, loop = copy.copy(pipe), _Loop()
    opened.one_by_one = False
    opened.engine = cast(Any, loop)
    opened(*prompt, **{**arguments, "output_type": "latent", "progress": False})
    assert loop.found is not None
    return loop.found
