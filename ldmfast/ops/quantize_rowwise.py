"""quantize_rowwise: signed 8-bit codes, integers or floats, with a scale for each row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, nbytes, register
from ._q8 import ROW_RESULT

RowCodes = tuple[Tensor, Tensor]
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what the largest magnitude of a row becomes


def code_dtype(fp8: bool) -> torch.dtype:
    return torch.float8_e4m3fn if fp8 else torch.int8


def reference(x: Tensor, fp8: bool) -> RowCodes:
    y, dtype = x.to(accumulator(x)), code_dtype(fp8)
    top = y.abs().amax(-1, keepdim=True) if x.shape[-1] else y.new_zeros((*x.shape[:-1], 1))
    scale = (top.double() / LARGEST[dtype]).float().clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.where(top == 0, 1.0, torch.where(torch.isfinite(scale), scale, torch.nan))
    codes = torch.nan_to_num(y / scale.to(y.dtype), nan=0.0)
    limit = LARGEST[dtype]
    codes = (codes if fp8 else codes.round()).clamp(-limit, limit)
    return fake(x, fp8)[0].copy_(codes.float()), scale.squeeze(-1).contiguous()


def peer(x: Tensor, fp8: bool) -> RowCodes:
    dtype = code_dtype(fp8)
    scale = x.abs().amax(-1).float() / LARGEST[dtype] if x.shape[-1] else fake(x, fp8)[1]
    codes = x.float() / scale.unsqueeze(-1)
    return (codes if fp8 else codes.round()).to(dtype), scale


def fake(x: Tensor, fp8: bool) -> RowCodes:
    return (x.new_empty(x.shape, dtype=code_dtype(fp8)), x.new_empty(x.shape[:-1], dtype=torch.float32))


def cost(x: Tensor, fp8: bool) -> Cost:
    return Cost(flops=4.0 * x.numel(), bytes=nbytes(x) + x.numel())


def cases() -> Iterator[Case]:
    def make(*shape: int, fp8: bool = False, layout: str = "contiguous", scale: float = 1.0, offset: float = 0.0):
        def draw(d: Draw) -> tuple:
            return d.normal(*shape, layout=layout, scale=scale, offset=offset), fp8
        return draw

    yield case("flux_tokens", "network big", make(1, 1536, 3072))
    yield case("flux_tokens_fp8", "network big", make(1, 1536, 3072, fp8=True))
    yield case("sd15_attention_weight", "network", make(1280, 1280))
    yield case("sd15_convolution_weight", "network big", make(1280, 11520))
    yield case("dit_xl", "network", make(2, 256, 1152))
    yield case("dit_xl_fp8", "network", make(2, 256, 1152, fp8=True))
    yield case("small", "", make(2, 9, 64))
    yield case("fp8", "", make(2, 9, 64, fp8=True))
    yield case("wide_fp8", "", make(3, 9000, fp8=True, scale=30.0))
    yield case("all_positive", "", make(3, 40, offset=9.0))
    yield case("tiny_numbers", "", make(3, 40, scale=1e-38, offset=3e-37))
    yield case("tiny_numbers_fp8", "", make(3, 40, scale=1e-38, offset=3e-37, fp8=True))
    yield case("zeros", "", make(3, 40, scale=0.0))
    yield case("zeros_fp8", "", make(3, 40, scale=0.0, fp8=True))
    yield case("ragged", "ragged", make(3, 5, 37))
    yield case("ragged_fp8", "ragged", make(3, 5, 37, fp8=True))
    yield case("one_column", "ragged", make(2, 3, 1))
    yield case("one_row", "ragged", make(19, fp8=True))
    yield case("misaligned", "view", make(2, 9, 33, layout="view"))
    yield case("sliced", "view", make(2, 9, 32, layout="slice", fp8=True))
    yield case("no_rows", "empty", make(0, 4, 32))
    yield case("no_columns", "empty", make(2, 4, 0, fp8=True))


_call = register(Op("quantize_rowwise", "(Tensor x, bool fp8)" + ROW_RESULT, reference, fake, cases, cost, peer))


@public
def quantize_rowwise(x: Tensor, *, fp8: bool = False) -> RowCodes:
    """8-bit codes of x with one scale a row: x is about q * scale[..., None]. For the weights of int8 products, for
    torch._int_mm, and with fp8 for torch._scaled_mm.

    x: (..., C), floating. Returns q, contiguous, of x's shape (int8, or float8_e4m3fn with fp8), and scale (float32,
    of shape (...)): scale = max |x| / 127 (448 with fp8), at least 2^-126, and q = x / scale, rounded to nearest,
    ties to even. scale is 1 for a row of zeros. If any element of a row is not finite, its scale is NaN and its q are
    0. (``quantize`` is for the activations of CPU products: unsigned, with a zero point, one scale for the tensor.)
    Raises ShapeError for a tensor without dimensions.
    """
    if x.ndim < 1:
        raise ShapeError("quantize_rowwise: x has no dimension, needs (..., channels)")
    return _call(x, fp8)
