"""Rows of tokens in a cache: shared by kv_append and kv_gather, which move them without looking at the numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import power_of_two

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Config:
    block_rows: int
    block_columns: int
    num_warps: int


def heuristic(columns: int, size: int) -> Config:
    together = 8192 // size  # bytes a program: 4 warps x 4 loads of 16 bytes a thread
    block = min(power_of_two(columns), together)
    return Config(max(1, together // block), block, 4)


def integers(x: Tensor) -> tuple[Tensor, int]:
    """x (batch, tokens, ...) as integers of its width, whose rows are whole, and the numbers in a row."""
    columns, expected = 1, True
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
        expected = expected and (size == 1 or stride == columns)
        columns *= size
    x = x if expected else x.contiguous()
    return x if x.dtype in _INTEGERS.values() else x.view(_INTEGERS[x.element_size()]), columns


@triton.jit
def slots(positions, capacity, RING: tl.constexpr):
    """The row of each position, -1 for none."""
    row = positions % capacity if RING else positions
    return tl.where((positions >= 0) & (row < capacity), row, -1)


@triton.jit
def tile(num_rows, columns, tiles, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and columns of a program, and which of them exist."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (pid % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    return row, c, row < num_rows, c < columns
