"""swiglu: first half times SiLU of the second half."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._faults import public
from ._op import Case, Op, accumulator, register
from .geglu import check, cost, fake, gated_cases


def reference(x: Tensor) -> Tensor:
    value, gate = x.to(accumulator(x)).chunk(2, dim=-1)
    return (value * gate * torch.sigmoid(gate)).to(x.dtype).contiguous()


def peer(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * torch.nn.functional.silu(gate)


def cases() -> Iterator[Case]:
    return gated_cases(llama_1024=(1, 1024, 16384), llama_77=(1, 77, 16384), dit_xl_256=(1, 256, 6144))


_call = register(Op("swiglu", "(Tensor x) -> Tensor", reference, fake, cases, cost, peer))


@public
def swiglu(x: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020, equation 6 without the matrices): x[..., :D] * silu(x[..., D:]), the order of diffusers.

    x: (..., 2 D), floating. Output: (..., D), contiguous, x's dtype.
    Raises ShapeError for an odd last dimension.
    """
    check("swiglu", x)
    return _call(x)
