"""geglu: first half times GELU of the second half, the gate of every Stable Diffusion feed-forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, nbytes, numel, register, shape_of


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


def _drawn(*shape: int, layout: str = "contiguous", scale: float = 1.0) -> Callable[[Draw], tuple[Tensor]]:
    return lambda d: (d.normal(*shape, layout=layout, scale=scale),)


def gated_cases(**networks: tuple[int, ...]) -> Iterator[Case]:
    """Shapes of networks by name, those above 2^23 numbers for benchmarks only, and what breaks kernels."""
    for name, shape in networks.items():
        yield case(name, "network big" if numel(shape) > 2**23 else "network", _drawn(*shape))
    yield case("small", "", _drawn(2, 9, 64))
    yield case("wide_range", "", _drawn(2, 7, 96, scale=6.0))
    yield case("ragged", "ragged", _drawn(3, 5, 74))
    yield case("one", "ragged", _drawn(2))
    yield case("rows", "ragged", _drawn(5, 6))
    yield case("misaligned", "view", _drawn(2, 9, 66, layout="view"))
    yield case("sliced", "view", _drawn(2, 9, 66, layout="slice"))
    yield case("no_rows", "empty", _drawn(0, 4, 64))
    yield case("no_columns", "empty", _drawn(2, 4, 0))


def cases() -> Iterator[Case]:
    return gated_cases(sd15_64x64=(2, 4096, 2560), sd15_16x16=(2, 256, 10240), sdxl_32x32=(2, 1024, 10240))


_call = register(Op("geglu", "(Tensor x) -> Tensor", reference, fake, cases, cost, peer))


def check(op: str, x: Tensor) -> None:
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ShapeError(f"{op}: x has shape {shape_of(x)}, needs an even last dimension (value and gate halves)")


@public
def geglu(x: Tensor) -> Tensor:
    """GEGLU (Shazeer 2020, equation 6 without the matrices): x[..., :D] * gelu(x[..., D:]), gelu with erf.

    x: (..., 2 D), floating. Output: (..., D), contiguous, x's dtype.
    Raises ShapeError for an odd last dimension.
    """
    check("geglu", x)
    return _call(x)
