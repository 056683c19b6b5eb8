"""out[r, d] = x[r, d] * activation(x[r, D + d]): what geglu, geglu_rows, geglu_tanh and swiglu share."""

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
    block = min(power_of_two(columns), 1024)  # 4 warps x 8 elements of 16 bits: one 16-byte load a thread and half
    return Config(max(1, 1024 // block), block, 4)  # narrow rows share a program, or most lanes would idle


def heuristic_rows(columns: int) -> Config:
    block = min(power_of_two(columns), 8192)  # 16 warps x 16 numbers a thread; wider rows are walked in pieces
    together = max(1, 512 // block)  # narrow rows share a program, or most lanes would idle
    return Config(together, block, min(16, max(1, block * together // 512)))


@triton.jit
def _gate(value, gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return value * (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)))
    elif ACTIVATION == "gelu_tanh":
        return value * (gate / (1 + tl.exp(gate * (gate * gate * -0.07135481627260025 - 1.5957691216057308))))
    else:
        return value * (gate / (1 + tl.exp(-gate)))


@triton.jit
def kernel(x, out, num_rows, columns, stride, tiles, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr,
           BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """x: (num_rows, 2 * columns), rows stride apart. out: (num_rows, columns), dense.

    ACTIVATION: "gelu" is g / 2 (1 + erf(g / sqrt 2)); "gelu_tanh" is g / 2 (1 + tanh u) = g / (1 + exp(-2 u)) with
    u = sqrt(2 / pi) (g + 0.044715 g^3); "silu" is g / (1 + exp(-g)).
    """
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (pid % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < num_rows)[:, None] & (column < columns)[None, :]
    source = x + row[:, None] * stride + column[None, :]
    value = tl.load(source, mask, other=0).to(ACC)
    gate = tl.load(source + columns, mask, other=0).to(ACC)
    result = _gate(value, gate, ACTIVATION)
    tl.store(out + row[:, None] * columns + column[None, :], result.to(out.dtype.element_ty), mask)


@triton.jit
def rows_kernel(x, q, scales, num_rows, columns, stride, FP8: tl.constexpr, ACTIVATION: tl.constexpr,
                BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FITS: tl.constexpr, ACC: tl.constexpr):
    """x as above; q: bytes of the codes of its result, dense; scales: (num_rows,) fp32. FITS: a row is at most BLOCK_C
    wide and stays in registers; otherwise it is read and computed twice."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    here = (row < num_rows)[:, None]
    source = x + row[:, None] * stride + c[None, :]
    target = q + row[:, None] * columns + c[None, :]
    if FITS:
        mask = here & (c < columns)[None, :]
        y = _gate(tl.load(source, mask, other=0).to(ACC), tl.load(source + columns, mask, other=0).to(ACC), ACTIVATION)
        scale = scale_of(tl.max(magnitude(y), 1), FP8)
        tl.store(target, codes(y, scale, FP8), mask)
    else:
        top = tl.zeros([BLOCK_R, BLOCK_C], ACC)
        for start in range(0, columns, BLOCK_C):
            mask = here & (start + c < columns)[None, :]
            y = _gate(tl.load(source + start, mask, other=0).to(ACC),
                      tl.load(source + start + columns, mask, other=0).to(ACC), ACTIVATION)
            top = tl.maximum(top, magnitude(y))
        scale = scale_of(tl.max(top, 1), FP8)
        for start in range(0, columns, BLOCK_C):
            mask = here & (start + c < columns)[None, :]
            y = _gate(tl.load(source + start, mask, other=0).to(ACC),
                      tl.load(source + start + columns, mask, other=0).to(ACC), ACTIVATION)
            tl.store(target + start, codes(y, scale, FP8), mask)
    tl.store(scales + row, scale, row < num_rows)


def gated(x: Tensor, activation: str, config: Config | None) -> Tensor:
    """x: (..., 2 D) floating -> (..., D), contiguous."""
    columns = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], columns))
    if out.numel() == 0:
        return out
    x, stride = rows(x)
    num_rows = out.numel() // columns
    config = config or heuristic(columns)
    tiles = triton.cdiv(columns, config.block_columns)
    grid = (triton.cdiv(num_rows, config.block_rows) * tiles,)
    with torch.cuda.device_of(x):
        kernel[grid](x, out, num_rows, columns, stride, tiles, ACTIVATION=activation, BLOCK_R=config.block_rows,
                     BLOCK_C=config.block_columns, ACC=accumulator(x), num_warps=config.num_warps)
    return out


def gated_rows(x: Tensor, activation: str, fp8: bool, config: Config | None) -> tuple[Tensor, Tensor]:
    """x: (..., 2 D) floating -> codes (..., D) (int8, or float8_e4m3fn), dense, and scales (...) in fp32."""
    columns = x.shape[-1] // 2
    q = x.new_empty((*x.shape[:-1], columns), dtype=torch.float8_e4m3fn if fp8 else torch.int8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if q.numel() == 0:
        return q, scale.fill_(1.0)
    x, stride = rows(x)
    num_rows = q.numel() // columns
    config = config or heuristic_rows(columns)
    with torch.cuda.device_of(x):
        rows_kernel[(triton.cdiv(num_rows, config.block_rows),)](
            x, q.view(torch.uint8), scale, num_rows, columns, stride, FP8=fp8, ACTIVATION=activation,
            BLOCK_R=config.block_rows, BLOCK_C=config.block_columns, FITS=columns <= config.block_columns,
            ACC=accumulator(x), num_warps=config.num_warps)
    return q, scale
