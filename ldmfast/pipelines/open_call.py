"""A call of any pipeline, opened: its networks with their conditions, its noise and step table, for another loop."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..samplers import StepTable
from ..samplers.sample import Denoiser, Generators

if TYPE_CHECKING:
    from .pipeline import Pipeline


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
    pictures share them, which is faster and the same but for rounding."""
    opened, loop = copy.copy(pipe), _Loop()
    opened.precision = f"{pipe.precision}, pictures together"
    opened.engine = cast(Any, loop)
    opened(*prompt, **{**arguments, "output_type": "latent", "progress": False})
    assert loop.found is not None
    return loop.found
