"""rms_norm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

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
def kernel(x, out, weight, num_rows, columns, stride, weight_stride, EPS: tl.constexpr, BLOCK_R: tl.constexpr,
           BLOCK_C: tl.constexpr, FITS: tl.constexpr, ACC: tl.constexpr):
    """x: (num_rows, columns), rows stride apart. out: the same, dense. weight: (columns,) or None.

    FITS: a row is at most BLOCK_C wide and stays in registers; otherwise it is read twice, the second time from cache.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    here = (row < num_rows)[:, None]
    source = x + row[:, None] * stride + c[None, :]
    target = out + row[:, None] * columns + c[None, :]
    if FITS:
        mask = here & (c < columns)[None, :]
        y = tl.load(source, mask, other=0).to(ACC)
        y *= tl.rsqrt(tl.sum(y * y, 1) / columns + EPS)[:, None]
        if weight is not None:
            y *= tl.load(weight + c * weight_stride, c < columns, other=0).to(ACC)[None, :]
        tl.store(target, y.to(out.dtype.element_ty), mask)
    else:
        total = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for start in range(0, columns, BLOCK_C):
            y = tl.load(source + start, here & (start + c < columns)[None, :], other=0).to(ACC)
            total += y * y
        inverse = tl.rsqrt(tl.sum(total, 1) / columns + EPS)[:, None]
        for start in range(0, columns, BLOCK_C):
            mask = here & (start + c < columns)[None, :]
            y = tl.load(source + start, mask, other=0).to(ACC) * inverse
            if weight is not None:
                y *= tl.load(weight + (start + c) * weight_stride, start + c < columns, other=0).to(ACC)[None, :]
            tl.store(target + start, y.to(out.dtype.element_ty), mask)


def launch(x: Tensor, weight: Tensor | None, eps: float, *, config: Config | None = None) -> Tensor:
    """x: (..., C) floating; weight: (C,) or None -> x's shape, dense."""
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    x, stride = rows(x)
    columns = x.shape[-1]
    num_rows = x.numel() // columns
    config = config or heuristic(columns)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(num_rows, config.block_rows),)](
            x, out, weight, num_rows, columns, stride, 0 if weight is None else weight.stride(0), EPS=eps,
            BLOCK_R=config.block_rows, BLOCK_C=config.block_columns, FITS=columns <= config.block_columns,
            ACC=accumulator(x), num_warps=config.num_warps)
    return out
