"""out[r, d] = x[r, d] * activation(x[r, D + d]): what geglu, geglu_tanh and swiglu share."""

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
    block = min(power_of_two(columns), 1024)  # 4 warps x 8 elements of 16 bits: one 16-byte load a thread and half
    return Config(max(1, 1024 // block), block, 4)  # narrow rows share a program, or most lanes would idle


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
    if ACTIVATION == "gelu":
        result = value * (0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476)))
    elif ACTIVATION == "gelu_tanh":
        result = value * (gate / (1 + tl.exp(gate * (gate * gate * -0.07135481627260025 - 1.5957691216057308))))
    else:
        result = value * (gate / (1 + tl.exp(-gate)))
    tl.store(out + row[:, None] * columns + column[None, :], result.to(out.dtype.element_ty), mask)


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
