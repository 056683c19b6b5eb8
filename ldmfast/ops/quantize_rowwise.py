"""quantize_rowwise: int8 rows with one scale each, as weights of 8-bit products are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ShapeError
from ._op import Case, Cost, Draw, Op, case, nbytes, register, shape_of


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    numbers = x.float()
    most = numbers.abs().amax(1) if x.shape[1] else numbers.new_zeros(len(x))
    scale = torch.where(most == 0, 1.0, (most / 127).clamp(min=torch.finfo(torch.float32).tiny))
    scale = torch.where(torch.isfinite(most), scale, torch.nan)
    return (numbers / scale[:, None]).round().nan_to_num(0.0).to(torch.int8), scale


peer = reference


def fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device), x.new_empty(len(x), dtype=torch.float32)


def cost(x: Tensor) -> Cost:
    return Cost(flops=4.0 * x.numel(), bytes=nbytes(x) + x.numel() + 4 * len(x))


def cases() -> Iterator[Case]:
    def make(*shape: int, layout: str = "contiguous", scale: float = 1.0):
        return lambda d: _draw(d, shape, layout, scale)

    yield case("sd15_attention", "network", make(1280, 1280))
    yield case("sd15_convolution", "network big", make(1280, 11520))
    yield case("tiny_numbers", "", make(3, 40, scale=1e-37))
    yield case("zeros", "", make(3, 40, scale=0.0))
    yield case("ragged", "ragged", make(5, 77))
    yield case("one_number", "ragged", make(1, 1))
    yield case("misaligned", "view", make(3, 35, layout="view"))
    yield case("sliced", "view", make(3, 35, layout="slice"))
    yield case("no_rows", "empty", make(0, 8))
    yield case("no_columns", "empty", make(2, 0))


def _draw(d: Draw, shape: tuple[int, ...], layout: str, scale: float) -> tuple[Tensor]:
    return (d.normal(*shape, layout=layout, scale=scale),)


_call = register(Op("quantize_rowwise", "(Tensor x) -> (Tensor q, Tensor scale)", reference, fake, cases, cost, peer,
                    cpu_only=True))


def quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 q and one scale for each row of x, symmetric: x is about q * scale[:, None].

    x: (rows, columns), floating; fp64 is rounded to fp32 first. Returns q (int8, x's shape) and scale
    (float32, (rows,)): scale = max |x| / 127 of the row and q = round(x / scale), ties to even (Jacob et al. 2018,
    section 3, with zero point 0). scale is 1 for a row of zeros, at least 2^-126; NaN, and q 0, for a row that is not
    finite.
    Raises ShapeError for another rank.
    """
    if x.ndim != 2:
        raise ShapeError(f"quantize_rowwise: x has shape {shape_of(x)}, needs (rows, columns)")
    return _call(x)
