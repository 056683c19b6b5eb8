"""kv_append: cache[b, positions[b, t]] = new[b, t]; the positions are read from device memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._token_rows import Config, heuristic, integers, slots, tile


@triton.jit
def kernel(cache, new, positions, num_rows, tokens, capacity, columns, cache_b, cache_t, new_b, new_t, positions_b,
           positions_t, tiles, RING: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """cache: (B, capacity, columns), new: (B, tokens, columns), rows dense. positions: (B, tokens) int64, positions_b
    is 0 where all elements share them. num_rows: B tokens."""
    row, c, here, inside = tile(num_rows, columns, tiles, BLOCK_R, BLOCK_C)
    b = row // tokens
    t = row % tokens
    slot = slots(tl.load(positions + b * positions_b + t * positions_t, here, other=-1), capacity, RING)
    mask = (here & (slot >= 0))[:, None] & inside[None, :]
    value = tl.load(new + (b * new_b + t * new_t)[:, None] + c[None, :], mask, other=0)
    tl.store(cache + (b * cache_b + slot * cache_t)[:, None] + c[None, :], value, mask)


def launch(cache: Tensor, new: Tensor, positions: Tensor, ring: bool, *, config: Config | None = None) -> None:
    """cache: (B, capacity, ...) with whole rows; new: (B, T, ...) of its dtype; positions: (B or 1, T) int64."""
    if new.numel() == 0 or cache.numel() == 0:
        return
    target, columns = integers(cache)
    new, _ = integers(new)
    rows = new.shape[0] * new.shape[1]
    config = config or heuristic(columns, target.element_size())
    tiles = triton.cdiv(columns, config.block_columns)
    with torch.cuda.device_of(cache):
        kernel[(triton.cdiv(rows, config.block_rows) * tiles,)](
            target, new, positions, rows, new.shape[1], target.shape[1], columns, *target.stride()[:2],
            *new.stride()[:2], positions.stride(0) if positions.shape[0] > 1 else 0, positions.stride(1), tiles,
            RING=ring, BLOCK_R=config.block_rows, BLOCK_C=config.block_columns, num_warps=config.num_warps)
