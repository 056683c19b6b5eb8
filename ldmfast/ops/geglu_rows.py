"""geglu_rows: geglu straight to int8 or e4m3 codes with a scale for each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from . import quantize_rowwise as rowwise
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, register
from ._q8 import ROW_RESULT, cost_of
from .geglu import cases as plain_cases
from .geglu import check
from .geglu import cost as plain_cost
from .geglu import fake as plain_fake
from .geglu import peer as plain_peer
from .geglu import reference as plain_reference


def reference(x: Tensor, fp8: bool) -> rowwise.RowCodes:
    return rowwise.reference(plain_reference(x.to(accumulator(x))), fp8)


def peer(x: Tensor, fp8: bool) -> rowwise.RowCodes:
    return rowwise.peer(plain_peer(x), fp8)


def fake(x: Tensor, fp8: bool) -> rowwise.RowCodes:
    return rowwise.fake(plain_fake(x), fp8)


def cost(x: Tensor, fp8: bool) -> Cost:
    return cost_of(plain_cost(x), x.numel() // 2, x.dtype)


def cases() -> Iterator[Case]:
    def make(old: Case, fp8: bool) -> Any:
        def draw(d: Draw) -> tuple[Any, ...]:
            return (*old.make(d), fp8)
        return draw

    few = {"sd15_64x64", "sd15_16x16", "small", "wide_range", "ragged", "one", "sliced", "no_rows", "no_columns"}
    for number, old in enumerate(c for c in plain_cases() if c.name in few):
        yield case(old.name, " ".join(old.tags), make(old, number % 2 == 0))


_call = register(Op("geglu_rows", "(Tensor x, bool fp8)" + ROW_RESULT, reference, fake, cases, cost, peer,
                    gpu_only=True))


@public
def geglu_rows(x: Tensor, *, fp8: bool = False) -> rowwise.RowCodes:
    """8-bit codes of y = geglu(x), which is never in memory itself, with one scale a row.

    x: (..., 2 D), floating; result (..., D) and formula as in quantize_rowwise. For GPUs: on a CPU the reference runs.
    Raises ShapeError for an odd last dimension.
    """
    check("geglu_rows", x)
    return _call(x, fp8)
