"""rms_norm: every row divided by its root mean square, times a weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, nbytes, register, shape_of


def reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    dtype = accumulator(x)
    y = x.to(dtype)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(dtype)
    return y.to(x.dtype).contiguous()


def peer(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def cost(x: Tensor, weight: Tensor | None, eps: float) -> Cost:
    return Cost(flops=4.0 * x.numel(), bytes=2 * nbytes(x) + nbytes(weight))


def cases() -> Iterator[Case]:
    def make(*shape: int, weighted: bool = True, layout: str = "contiguous", scale: float = 1.0, offset: float = 0.1):
        def draw(d: Draw) -> tuple:
            return (d.normal(*shape, layout=layout, scale=scale, offset=offset),
                    d.normal(shape[-1], offset=1.0, scale=0.2) if weighted else None, 1e-6)
        return draw

    yield case("t5_xxl", "network big", make(2, 512, 4096))
    yield case("t5_xxl_77", "network", make(1, 77, 4096))
    yield case("tokens_1152", "network", make(2, 256, 1152))
    yield case("small", "", make(2, 9, 64))
    yield case("plain", "", make(2, 9, 64, weighted=False))
    yield case("heads", "", make(2, 5, 4, 24))
    yield case("far_mean", "", make(2, 9, 320, offset=30.0))
    yield case("tiny_numbers", "", make(3, 40, scale=1e-4, offset=0.0))
    yield case("zeros", "", make(3, 40, scale=0.0, offset=0.0))
    yield case("wide", "", make(2, 9000))
    yield case("ragged", "ragged", make(3, 5, 37))
    yield case("one_column", "ragged", make(2, 3, 1))
    yield case("one_row", "ragged", make(19))
    yield case("misaligned", "view", make(2, 9, 33, layout="view"))
    yield case("sliced", "view", make(2, 9, 32, layout="slice"))
    yield case("no_rows", "empty", make(0, 4, 32))
    yield case("no_columns", "empty", make(2, 4, 0))


_call = register(Op("rms_norm", "(Tensor x, Tensor? weight, float eps) -> Tensor", reference, fake, cases, cost, peer))


@public
def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMSNorm (Zhang and Sennrich 2019, equation 4): x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x: (..., C), floating. weight: (C,). Output: contiguous, x's shape and dtype. The mean in fp32 (fp64 for fp64).
    Raises ShapeError when sizes do not fit.
    """
    if x.ndim < 1:
        raise ShapeError("rms_norm: x has no dimension, needs (..., channels)")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ShapeError(f"rms_norm: weight has shape {shape_of(weight)}, needs ({x.shape[-1]},)")
    return _call(x, weight, eps)
