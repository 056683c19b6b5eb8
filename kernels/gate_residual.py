"""gate_residual: out = x + gate * y, one row of gate for the tokens of a batch element."""

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
    block = min(power_of_two(columns), 1024)  # 4 warps x 8 elements of 16 bits: one 16-byte load a thread and tensor
    return Config(max(1, 1024 // block), block, 4)  # narrow rows share a program, or most lanes would idle


@triton.jit
def kernel(x, y, gate, out, num_rows, tokens, columns, stride_x, stride_y, gate_n, gate_c, tiles,
           BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """x, y: (num_rows, columns), rows stride_x and stride_y apart. out: the same, dense.

    gate: (num_rows / tokens, columns), its rows gate_n apart (0: one row for all).
    """
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (pid % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < num_rows)[:, None] & (c < columns)[None, :]
    base = tl.load(x + row[:, None] * stride_x + c[None, :], mask, other=0).to(ACC)
    branch = tl.load(y + row[:, None] * stride_y + c[None, :], mask, other=0).to(ACC)
    factor = tl.load(gate + (row // tokens)[:, None] * gate_n + c[None, :] * gate_c, mask, other=0).to(ACC)
    tl.store(out + row[:, None] * columns + c[None, :], (base + factor * branch).to(out.dtype.element_ty), mask)


def launch(x: Tensor, y: Tensor, gate: Tensor, *, config: Config | None = None) -> Tensor:
    """x, y: (..., T, C) floating; gate: (N or 1, C) -> x's shape, dense."""
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    x, stride_x = rows(x)
    y, stride_y = rows(y)
    columns, tokens = x.shape[-1], x.shape[-2]
    num_rows = out.numel() // columns
    config = config or heuristic(columns)
    tiles = triton.cdiv(columns, config.block_columns)
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(num_rows, config.block_rows) * tiles,)](
            x, y, gate, out, num_rows, tokens, columns, stride_x, stride_y,
            gate.stride(0) if gate.shape[0] > 1 else 0, gate.stride(1), tiles, BLOCK_R=config.block_rows,
            BLOCK_C=config.block_columns, ACC=accumulator(x), num_warps=config.num_warps)
    return out
