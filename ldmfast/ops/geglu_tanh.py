"""geglu_tanh: first half times the tanh approximation of GELU of the second half, the gate of T5 v1.1."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._faults import public
from ._op import Case, Op, accumulator, register
from .geglu import check, cost, fake, gated_cases


def reference(x: Tensor) -> Tensor:
    value, gate = x.to(accumulator(x)).chunk(2, dim=-1)
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (value * gelu).to(x.dtype).contiguous()


def peer(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate, approximate="tanh")


def cases() -> Iterator[Case]:
    return gated_cases(t5_xxl_512=(1, 512, 20480), t5_xxl_77=(1, 77, 20480), t5_large_77=(2, 77, 5632))


_call = register(Op("geglu_tanh", "(Tensor x) -> Tensor", reference, fake, cases, cost, peer))


@public
def geglu_tanh(x: Tensor) -> Tensor:
    """GEGLU (Shazeer 2020, equation 6 without the matrices) with GELU's tanh approximation (Hendrycks and Gimpel 2016,
    section 2): x[..., :D] * gelu(x[..., D:]). T5 v1.1's feed-forward, with [wi_1, wi_0] as one projection.

    x: (..., 2 D), floating. Output: (..., D), contiguous, x's dtype.
    Raises ShapeError for an odd last dimension.
    """
    check("geglu_tanh", x)
    return _call(x)
