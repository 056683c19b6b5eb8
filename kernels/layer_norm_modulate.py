"""layer_norm_modulate: y = ((x - mean) * rstd * weight + bias) * (1 + scale) + shift over the last dimension."""

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
    warps = min(16, max(1, block * together // 512))  # 16 numbers a thread
    return Config(together, block, warps)


@triton.jit
def _affine(y, c, valid, mask, batch, weight, bias, scale, shift, weight_stride, bias_stride, scale_n, scale_c,
            shift_n, shift_c, ACC: tl.constexpr):
    """y: (rows, C) normalised; valid: columns that exist; mask: elements that exist; batch: element of each row."""
    if weight is not None:
        y *= tl.load(weight + c * weight_stride, valid, other=0).to(ACC)[None, :]
    if bias is not None:
        y += tl.load(bias + c * bias_stride, valid, other=0).to(ACC)[None, :]
    if scale is not None:
        y *= 1 + tl.load(scale + batch[:, None] * scale_n + c[None, :] * scale_c, mask, other=0).to(ACC)
    if shift is not None:
        y += tl.load(shift + batch[:, None] * shift_n + c[None, :] * shift_c, mask, other=0).to(ACC)
    return y


@triton.jit
def kernel(x, out, row_scale, scale, shift, weight, bias, num_rows, tokens, columns, stride, scale_n, scale_c, shift_n,
           shift_c, weight_stride, bias_stride, EPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
           FITS: tl.constexpr, ACC: tl.constexpr, FP8: tl.constexpr):
    """x: (num_rows, columns), rows stride apart. out: the same, dense; with row_scale (num_rows,), fp32, its codes:
    e4m3 where FP8, else int8. weight, bias: (columns,) or None.

    scale, shift: (num_rows / tokens, columns) or None. FITS: a row is at most BLOCK_C wide and stays in registers;
    otherwise it is read three times (for codes four), the later ones from cache.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    batch = row // tokens
    here = (row < num_rows)[:, None]
    source = x + row[:, None] * stride + c[None, :]
    target = out + row[:, None] * columns + c[None, :]
    if FITS:
        mask = here & (c < columns)[None, :]
        y = tl.load(source, mask, other=0).to(ACC)
        y -= (tl.sum(y, 1) / columns)[:, None]
        square = tl.where(mask, y * y, 0)
        y *= tl.rsqrt(tl.sum(square, 1) / columns + EPS)[:, None]
        y = _affine(y, c, c < columns, mask, batch, weight, bias, scale, shift, weight_stride, bias_stride, scale_n,
                    scale_c, shift_n, shift_c, ACC)
        if row_scale is None:
            tl.store(target, y.to(out.dtype.element_ty), mask)
        else:
            step = scale_of(tl.max(tl.where(mask, magnitude(y), 0), 1), FP8)
            tl.store(target, codes(y, step, FP8), mask)
            tl.store(row_scale + row, step, row < num_rows)
    else:
        total = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for start in range(0, columns, BLOCK_C):
            total += tl.load(source + start, here & (start + c < columns)[None, :], other=0).to(ACC)
        mean = (tl.sum(total, 1) / columns)[:, None]
        total = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for start in range(0, columns, BLOCK_C):
            mask = here & (start + c < columns)[None, :]
            y = tl.load(source + start, mask, other=0).to(ACC) - mean
            total += tl.where(mask, y * y, 0)
        rstd = tl.rsqrt(tl.sum(total, 1) / columns + EPS)[:, None]
        step = tl.zeros([BLOCK_R], tl.float32)
        if row_scale is not None:
            top = tl.zeros([BLOCK_R, BLOCK_C], ACC)
            for start in range(0, columns, BLOCK_C):
                mask = here & (start + c < columns)[None, :]
                y = (tl.load(source + start, mask, other=0).to(ACC) - mean) * rstd
                y = _affine(y, start + c, start + c < columns, mask, batch, weight, bias, scale, shift, weight_stride,
                            bias_stride, scale_n, scale_c, shift_n, shift_c, ACC)
                top = tl.maximum(top, tl.where(mask, magnitude(y), 0))
            step = scale_of(tl.max(top, 1), FP8)
            tl.store(row_scale + row, step, row < num_rows)
        for start in range(0, columns, BLOCK_C):
            mask = here & (start + c < columns)[None, :]
            y = (tl.load(source + start, mask, other=0).to(ACC) - mean) * rstd
            y = _affine(y, start + c, start + c < columns, mask, batch, weight, bias, scale, shift, weight_stride,
                        bias_stride, scale_n, scale_c, shift_n, shift_c, ACC)
            if row_scale is None:
                tl.store(target + start, y.to(out.dtype.element_ty), mask)
            else:
                tl.store(target + start, codes(y, step, FP8), mask)


def _strides(p: Tensor | None) -> tuple[int, int]:
    """Strides of a (batches or 1, C) condition; a single row serves every batch element."""
    if p is None:
        return 0, 0
    return (p.stride(0) if p.shape[0] > 1 else 0), p.stride(1)


def launch(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
           eps: float, *, config: Config | None = None) -> Tensor:
    """x: (..., T, C) floating; scale, shift: (N or 1, C) or None; weight, bias: (C,) or None -> x's shape, dense."""
    out = x.new_empty(x.shape)
    start(x, out, None, scale, shift, weight, bias, eps, False, config)
    return out


def start(x: Tensor, out: Tensor, row_scale: Tensor | None, scale: Tensor | None, shift: Tensor | None,
          weight: Tensor | None, bias: Tensor | None, eps: float, fp8: bool, config: Config | None) -> None:
    """Fills out, x's shape, dense: with the result, or where row_scale (..., T) is given with its bytes of codes."""
    if out.numel() == 0:
        return
    x, stride = rows(x)
    columns, tokens = x.shape[-1], x.shape[-2]
    num_rows = x.numel() // columns
    config = config or heuristic(columns)
    one = [0 if p is None else p.stride(0) for p in (weight, bias)]
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(num_rows, config.block_rows),)](
            x, out, row_scale, scale, shift, weight, bias, num_rows, tokens, columns, stride, *_strides(scale),
            *_strides(shift), *one, EPS=eps, BLOCK_R=config.block_rows, BLOCK_C=config.block_columns,
            FITS=columns <= config.block_columns, ACC=accumulator(x), FP8=fp8, num_warps=config.num_warps)
