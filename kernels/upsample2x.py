"""upsample2x: out[n, c, i, j] = x[n, c, i // 2, j // 2]; every input element is read once and written four times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import power_of_two


@dataclass(frozen=True)
class Config:
    block_rows: int
    block_columns: int
    num_warps: int


def heuristic(columns: int) -> Config:
    block = min(power_of_two(columns), 512)  # 512 channels of 16 bits: 1 KiB runs, far above the 128-byte line
    return Config(max(1, 1024 // block), block, 4)  # 1024 reads and 4096 writes a program keep 4 warps busy


@triton.jit
def channels_last_kernel(x, out, pixels, channels, height, width, stride_n, stride_c, stride_h, stride_w, tiles,
                         BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """x: (N, C, H, W) with any strides. out: (N, 2 H, 2 W, C) dense in that order. A row is one input pixel."""
    pid = tl.program_id(0)
    pixel = (pid // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (pid % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (c < channels)[None, :]
    w = pixel % width
    line = pixel // width  # n * height + h
    source = (line // height) * stride_n + (line % height) * stride_h + w * stride_w
    value = tl.load(x + source[:, None] + c.to(tl.int64)[None, :] * stride_c, mask, other=0)
    first = out + ((line * 4 * width + 2 * w) * channels)[:, None] + c[None, :]
    below = tl.full([], 2, tl.int64) * width * channels  # a width of 1 is a constant here and has no .to
    tl.store(first, value, mask)
    tl.store(first + channels, value, mask)
    tl.store(first + below, value, mask)
    tl.store(first + below + channels, value, mask)


@triton.jit
def contiguous_kernel(x, out, lines, channels, height, width, stride_n, stride_c, stride_h, stride_w, tiles,
                      BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """x: (N, C, H, W) with any strides. out: (N, C, 2 H, 2 W) dense. A line is one (n, c, h)."""
    pid = tl.program_id(0)
    line = (pid // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = (pid % tiles) * BLOCK_W
    w = first + tl.arange(0, BLOCK_W)
    plane = line // height
    source = (plane // channels) * stride_n + (plane % channels) * stride_c + (line % height) * stride_h
    value = tl.load(x + source[:, None] + w.to(tl.int64)[None, :] * stride_w,
                    (line < lines)[:, None] & (w < width)[None, :], other=0)
    doubled = tl.interleave(value, value)
    j = 2 * first + tl.arange(0, 2 * BLOCK_W)
    mask = (line < lines)[:, None] & (j < 2 * width)[None, :]
    target = out + (line * 4 * width)[:, None] + j[None, :]
    tl.store(target, doubled, mask)
    tl.store(target + 2 * width, doubled, mask)


def launch(x: Tensor, *, config: Config | None = None) -> Tensor:
    """x: (N, C, H, W) floating -> (N, C, 2 H, 2 W), x's layout."""
    n, c, h, w = x.shape
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty((n, c, 2 * h, 2 * w), dtype=x.dtype, device=x.device,
                      memory_format=torch.channels_last if last else torch.contiguous_format)
    if out.numel() == 0:
        return out
    columns, lines = (c, n * h * w) if last else (w, n * c * h)
    config = config or heuristic(columns)
    tiles = triton.cdiv(columns, config.block_columns)
    grid = (triton.cdiv(lines, config.block_rows) * tiles,)
    kernel = channels_last_kernel if last else contiguous_kernel
    with torch.cuda.device_of(x):
        kernel[grid](x, out, lines, c, h, w, *x.stride(), tiles, config.block_rows, config.block_columns,
                     num_warps=config.num_warps)
    return out
