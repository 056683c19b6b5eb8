"""lincomb: out[i] = sum_j table[row, j] * inputs[j][i]; table and row are read from device memory.

Nothing here depends on the values of table or row on the host, so one captured graph serves every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import accumulator, processors


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int


def heuristic(numel: int, processors: int) -> Config:
    if numel <= 256 * 2 * processors:  # latents of one picture: more, smaller programs than multiprocessors
        return Config(256, 2)  # 4 elements a thread
    return Config(1024, 4)  # 8 elements a thread: one 16-byte load of 16-bit numbers from each input


@triton.jit
def kernel(table, row, inputs, out, numel, stride_row, stride_column, COUNT: tl.constexpr, BLOCK: tl.constexpr,
           ACC: tl.constexpr):
    """table: (rows, COUNT) float64. row: one int64, or None for row 0. inputs: COUNT pointers to numel elements.

    out: numel elements. The branch on a zero coefficient is uniform over the program: its input is not read.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    coefficients = table
    if row is not None:
        coefficients += tl.load(row) * stride_row
    total = tl.zeros([BLOCK], ACC)
    for j in tl.static_range(COUNT):
        coefficient = tl.load(coefficients + j * stride_column).to(ACC)
        if coefficient != 0:
            total += coefficient * tl.load(inputs[j] + i, mask, other=0).to(ACC)
    tl.store(out + i, total.to(out.dtype.element_ty), mask)


def _layout(x: Tensor) -> torch.memory_format:
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == rank and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def launch(table: Tensor, row: Tensor | None, inputs: Sequence[Tensor], *, config: Config | None = None) -> Tensor:
    """table (rows, n) float64; row one int64 or None (row 0); n inputs of one shape -> inputs[0]'s dtype, layout."""
    layout = _layout(inputs[0])
    out = torch.empty_like(inputs[0], memory_format=layout)
    if out.numel() == 0:
        return out
    dense = tuple(x.contiguous(memory_format=layout) for x in inputs)
    config = config or heuristic(out.numel(), processors(out))
    with torch.cuda.device_of(out):
        kernel[(triton.cdiv(out.numel(), config.block),)](
            table, row, dense, out, out.numel(), *table.stride(), COUNT=len(dense), BLOCK=config.block,
            ACC=accumulator(out), num_warps=config.num_warps)
    return out
