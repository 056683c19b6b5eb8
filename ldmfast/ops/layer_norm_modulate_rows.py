"""layer_norm_modulate_rows: layer_norm_modulate straight to int8 or e4m3 codes with a scale for each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from . import quantize_rowwise as rowwise
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, register
from ._q8 import ROW_RESULT, cost_of
from .layer_norm_modulate import cases as plain_cases
from .layer_norm_modulate import check, condition
from .layer_norm_modulate import cost as plain_cost
from .layer_norm_modulate import peer as plain_peer
from .layer_norm_modulate import reference as plain_reference


def reference(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
              eps: float, fp8: bool) -> rowwise.RowCodes:
    return rowwise.reference(plain_reference(x.to(accumulator(x)), scale, shift, weight, bias, eps), fp8)


def peer(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
         eps: float, fp8: bool) -> rowwise.RowCodes:
    return rowwise.peer(plain_peer(x, scale, shift, weight, bias, eps), fp8)


def fake(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
         eps: float, fp8: bool) -> rowwise.RowCodes:
    return rowwise.fake(x, fp8)


def cost(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
         eps: float, fp8: bool) -> Cost:
    return cost_of(plain_cost(x, scale, shift, weight, bias, eps), x.numel(), x.dtype)


def cases() -> Iterator[Case]:
    def make(old: Case, fp8: bool) -> Any:
        def draw(d: Draw) -> tuple[Any, ...]:
            return (*old.make(d), fp8)
        return draw

    few = {"sd15_64x64", "dit_xl", "both", "ragged", "one_column", "far_mean", "misaligned", "no_batch"}
    for number, old in enumerate(c for c in plain_cases() if c.name in few):
        yield case(old.name, " ".join(old.tags), make(old, number % 2 == 0))


_call = register(Op("layer_norm_modulate_rows", "(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, "
                    "Tensor? bias, float eps, bool fp8)" + ROW_RESULT, reference, fake, cases, cost, peer,
                    gpu_only=True))


@public
def layer_norm_modulate_rows(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
                             weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
                             fp8: bool = False) -> rowwise.RowCodes:
    """8-bit codes of y = layer_norm_modulate(x, ...), which is never in memory itself, with one scale a row.

    Arguments as in layer_norm_modulate; result and formula as in quantize_rowwise. For GPUs: on a CPU the reference
    runs. Raises ShapeError when sizes do not fit.
    """
    name = "layer_norm_modulate_rows"
    check(name, x, weight, bias)
    return _call(x, condition(name, "scale", scale, x), condition(name, "shift", shift, x), weight, bias, eps, fp8)
