"""quantize_rowwise: int8 or e4m3 codes with a scale for each row: scale = max |x| / 127 or 448, q = x / scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import accumulator, power_of_two, rows
from ._row_codes import codes, magnitude, scale_of


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
        scale = scale_of(tl.max(magnitude(y), 1), FP8)
        tl.store(target, codes(y, scale, FP8), mask)
    else:
        top = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for start in range(0, columns, BLOCK_C):
            y = tl.load(source + start, here & (start + c < columns)[None, :], other=0).to(ACC)
            top = tl.maximum(top, magnitude(y))
        scale = scale_of(tl.max(top, 1), FP8)
        for start in range(0, columns, BLOCK_C):
            mask = here & (start + c < columns)[None, :]
            y = tl.load(source + start, mask, other=0).to(ACC)
            tl.store(target + start, codes(y, scale, FP8), mask)
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
