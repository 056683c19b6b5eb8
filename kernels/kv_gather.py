"""kv_gather: out[b, t] = cache[source[b], positions[b, t]]; positions and source are read from device memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._token_rows import Config, heuristic, integers, slots, tile


@triton.jit
def kernel(cache, positions, source, out, num_rows, tokens, batch, capacity, columns, cache_b, cache_t, positions_b,
           positions_t, source_b, tiles, RING: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """cache: (batch, capacity, columns), rows dense. positions: (N, tokens) int64, positions_b is 0 where all elements
    share them. source: (N,) int64 or None. out: (N, tokens, columns), dense. num_rows: N tokens."""
    row, c, here, inside = tile(num_rows, columns, tiles, BLOCK_R, BLOCK_C)
    b = row // tokens
    slot = slots(tl.load(positions + b * positions_b + (row % tokens) * positions_t, here, other=-1), capacity, RING)
    element = b
    if source is not None:
        element = tl.load(source + b * source_b, here, other=-1)
    there = here & (slot >= 0) & (element >= 0) & (element < batch)
    value = tl.load(cache + (element * cache_b + slot * cache_t)[:, None] + c[None, :],
                    there[:, None] & inside[None, :], other=0)
    tl.store(out + row[:, None] * columns + c[None, :], value, here[:, None] & inside[None, :])


def launch(cache: Tensor, positions: Tensor, source: Tensor | None, ring: bool, *, config: Config | None = None
           ) -> Tensor:
    """cache: (B, capacity, ...); positions: (N or 1, T) int64; source: (N,) int64 or None -> (N, T, ...), dense."""
    batch = cache.shape[0] if source is None else source.shape[0]
    out = cache.new_empty((batch, positions.shape[1], *cache.shape[2:]))
    if out.numel() == 0:
        return out
    if cache.numel() == 0:
        return out.zero_()
    held, columns = integers(cache)
    target, _ = integers(out)
    rows = batch * positions.shape[1]
    config = config or heuristic(columns, held.element_size())
    tiles = triton.cdiv(columns, config.block_columns)
    with torch.cuda.device_of(cache):
        kernel[(triton.cdiv(rows, config.block_rows) * tiles,)](
            held, positions, source, target, rows, positions.shape[1], held.shape[0], held.shape[1], columns,
            *held.stride()[:2], positions.stride(0) if positions.shape[0] > 1 else 0, positions.stride(1),
            0 if source is None else source.stride(0), tiles, RING=ring, BLOCK_R=config.block_rows,
            BLOCK_C=config.block_columns, num_warps=config.num_warps)
    return out
