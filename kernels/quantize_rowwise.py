"""quantize_rowwise: int8 or e4m3 codes with a scale for each row: scale = max |x| / 127 or 448, q = x / scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import accumulator, power_of_two, rows


@dataclass(frozen=True)
class Config:
    block_rows: int
    block_columns: int
    num_warps: int


def heuristic(columns: int) -> Config:
    block = min(power_of_two(columns), 8192)  # 16 warps x 16 numbers a thread; wider rows are walked in pieces
    together = max(1, 512 // block)  # one warp of 16-byte loads covers 256 numbers: narrow rows share a program
    return Config(together, block, min(16, max(1, block * together // 512)))  # 16 numbers a thread


@triton.jit
def _codes(y, scale, FP8: tl.constexpr):
    """Of rows y and their scales; bytes. e4m3 by hand, since sm_80 has no such conversion."""
    v = tl.where(scale == scale, tl.div_rn(y, scale) if y.dtype == tl.float32 else y / scale, 0.0).to(tl.float32)
    if FP8:
        bits = v.to(tl.int32, bitcast=True)
        sign = (bits >> 24) & 0x80
        bits = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
        shifted = bits.to(tl.float32, bitcast=True) + 16384.0  # below 2^-6 fractions end at 2^-9
        small = shifted.to(tl.int32, bitcast=True) - 0x46800000
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        return (sign | tl.where(bits < 0x3C800000, small, normal)).to(tl.uint8)
    else:
        bounded = tl.minimum(tl.maximum(v, -127.0), 127.0) + 12582912.0  # 1.5 * 2^23 leaves no room for a fraction
        return (bounded.to(tl.int32, bitcast=True) - 0x4B400000).to(tl.uint8)


@triton.jit
def _scale(top, FP8: tl.constexpr):
    """Of rows whose largest magnitude is top (infinite if one is NaN)."""
    scale = (top.to(tl.float64) / (448.0 if FP8 else 127.0)).to(tl.float32)
    scale = tl.where(top == 0, 1.0, tl.maximum(scale, 1.1754943508222875e-38))
    return tl.where(scale < float("inf"), scale, float("nan"))


@triton.jit
def _magnitude(y):
    return tl.where(y == y, tl.abs(y), float("inf"))


@triton.jit
def kernel(x, q, scales, num_rows, columns, stride, FP8: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
           FITS: tl.constexpr, ACC: tl.constexpr):
    """x: (num_rows, columns), rows stride apart. q: bytes of the same, dense. scales: (num_rows,) fp32.

    FITS: a row is at most BLOCK_C wide and stays in registers; otherwise it is read twice, the second time from cache.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    here = (row < num_rows)[:, None]
    source = x + row[:, None] * stride + c[None, :]
    target = q + row[:, None] * columns + c[None, :]
    if FITS:
        mask = here & (c < columns)[None, :]
        y = tl.load(source, mask, other=0).to(ACC)
        scale = _scale(tl.max(_magnitude(y), 1), FP8)
        tl.store(target, _codes(y, scale.to(ACC)[:, None] + tl.zeros_like(y), FP8), mask)
    else:
        top = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for start in range(0, columns, BLOCK_C):
            y = tl.load(source + start, here & (start + c < columns)[None, :], other=0).to(ACC)
            top = tl.maximum(top, _magnitude(y))
        scale = _scale(tl.max(top, 1), FP8)
        for start in range(0, columns, BLOCK_C):
            mask = here & (start + c < columns)[None, :]
            y = tl.load(source + start, mask, other=0).to(ACC)
            tl.store(target + start, _codes(y, scale.to(ACC)[:, None] + tl.zeros_like(y), FP8), mask)
    tl.store(scales + row, scale, row < num_rows)


def launch(x: Tensor, fp8: bool, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """x: (..., C) floating -> codes of x's shape (int8, or float8_e4m3fn), dense, and scales (...) in fp32."""
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else torch.int8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if q.numel() == 0:
        return q, scale.fill_(1.0)
    x, stride = rows(x)
    columns = x.shape[-1]
    num_rows = x.numel() // columns
    config = config or heuristic(columns)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(num_rows, config.block_rows),)](
            x, q.view(torch.uint8), scale, num_rows, columns, stride, FP8=fp8, BLOCK_R=config.block_rows,
            BLOCK_C=config.block_columns, FITS=columns <= config.block_columns, ACC=accumulator(x),
            num_warps=config.num_warps)
    return q, scale
