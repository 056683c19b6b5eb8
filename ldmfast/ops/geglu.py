"""geglu: first half times GELU of the second half, the gate of every Stable Diffusion feed-forward."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ShapeError
from ._op import Case, Cost, Op, accumulator, case, nbytes, register, shape_of


def reference(x: Tensor) -> Tensor:
    value, gate = x.to(accumulator(x)).chunk(2, dim=-1)
    gelu = 0.5 * gate * (1 + torch.erf(gate * math.sqrt(0.5)))
    return (value * gelu).to(x.dtype).contiguous()


def peer(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def cost(x: Tensor) -> Cost:
    return Cost(flops=20.0 * x.numel() / 2, bytes=1.5 * nbytes(x))


def cases() -> Iterator[Case]:
    def make(*shape: int, layout: str = "contiguous", scale: float = 1.0):
        return lambda d: (d.normal(*shape, layout=layout, scale=scale),)

    yield case("sd15_64x64", "network big", make(2, 4096, 2560))
    yield case("sd15_16x16", "network", make(2, 256, 10240))
    yield case("sdxl_32x32", "network big", make(2, 1024, 10240))
    yield case("small", "", make(2, 9, 64))
    yield case("wide_range", "", make(2, 7, 96, scale=6.0))
    yield case("ragged", "ragged", make(3, 5, 74))
    yield case("one", "ragged", make(2))
    yield case("rows", "ragged", make(5, 6))
    yield case("misaligned", "view", make(2, 9, 66, layout="view"))
    yield case("sliced", "view", make(2, 9, 66, layout="slice"))
    yield case("no_rows", "empty", make(0, 4, 64))
    yield case("no_columns", "empty", make(2, 4, 0))


_call = register(Op("geglu", "(Tensor x) -> Tensor", reference, fake, cases, cost, peer))


def check(op: str, x: Tensor) -> None:
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ShapeError(f"{op}: x has shape {shape_of(x)}, needs an even last dimension (value and gate halves)")


def geglu(x: Tensor) -> Tensor:
    """GEGLU (Shazeer 2020, equation 6 without the matrices): x[..., :D] * gelu(x[..., D:]), gelu with erf.

    x: (..., 2 D), floating. Output: (..., D), contiguous, x's dtype.
    Raises ShapeError for an odd last dimension.
    """
    check("geglu", x)
    return _call(x)
