"""geglu_q8: geglu straight to uint8 codes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ._faults import public
from ._op import Case, Cost, Op, accumulator, register
from ._q8 import RESULT, Codes, cost_of, empty_codes, encode, ends, torch_encode
from .geglu import cases as plain_cases
from .geglu import check
from .geglu import cost as plain_cost
from .geglu import peer as plain_peer
from .geglu import reference as plain_reference


def reference(x: Tensor) -> Codes:
    y = plain_reference(x.to(accumulator(x)))
    return encode(y, *ends(y))


def peer(x: Tensor) -> Codes:
    return torch_encode(plain_peer(x))


def fake(x: Tensor) -> Codes:
    return empty_codes(x, (*x.shape[:-1], x.shape[-1] // 2))


def cost(x: Tensor) -> Cost:
    return cost_of(plain_cost(x), x.numel() // 2, x.dtype)


def cases() -> Iterator[Case]:
    return iter(plain_cases())


_call = register(Op("geglu_q8", "(Tensor x)" + RESULT, reference, fake, cases, cost, peer, cpu_only=True))


@public
def geglu_q8(x: Tensor) -> Codes:
    """uint8 codes of y = geglu(x), which is never in memory itself.

    x: (..., 2 D), floating. Result and formula as in quantize, q of shape (..., D), contiguous.
    Raises ShapeError for an odd last dimension.
    """
    check("geglu_q8", x)
    return _call(x)
