"""group_norm_silu: y = silu((x + shift - mean) * rstd * weight + bias), statistics over one group of channels.

x is seen as (N, C, S) with any strides, so one set of kernels serves channels-last and contiguous tensors: only the
shape of the tile changes. Small groups: one program holds a whole group in registers, one read and one write. Large
groups: ``stats`` (Welford per tile element, every program a piece of all groups), ``finish`` (joins the pieces),
``apply``; two reads and one write, the second read partly from the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import accumulator, power_of_two, processors
from ._row_codes import e4m3

FINISH_BLOCK = 1024  # a group has splits x channels pieces; most have fewer than this


@dataclass(frozen=True)
class Config:
    """One pass: the tile holds a group (spatial x channels). Otherwise splits programs share the spatial positions."""

    one_pass: bool
    block_spatial: int
    block_channels: int
    splits: int
    num_warps: int


def heuristic(channels: int, spatial: int, groups: int, last: bool, processors: int, largest: int = 16384) -> Config:
    """Does not look at the batch size: a picture's sums must not depend on what shares its batch. largest: tile of one
    pass; codes take registers, and spill where the result itself does not."""
    size = channels // groups
    tile = power_of_two(spatial) * power_of_two(size)
    if tile <= largest:  # 16 warps x 32 fp32 registers a thread; larger tiles spill or leave one program a processor
        return Config(True, power_of_two(spatial), power_of_two(size), 1, max(1, min(16, tile // 1024)))
    if last:
        block_c = min(power_of_two(channels), 256)  # 512 bytes of 16-bit numbers a row: whole sectors, 16-byte loads
        block_s = 4096 // block_c  # with 8 warps 16 elements a thread, two accumulators each: 48 registers
    else:
        block_s = min(power_of_two(spatial), 1024)  # 2 KiB runs of one channel
        block_c = 4096 // block_s
    tiles = triton.cdiv(channels, block_c)
    wanted = triton.cdiv(4 * processors, tiles)  # four 8-warp programs fill a multiprocessor's 2048 threads by half
    pieces = triton.cdiv(spatial, block_s)
    rows = triton.cdiv(pieces, max(1, min(wanted, pieces))) * block_s
    return Config(False, block_s, block_c, triton.cdiv(spatial, rows), 8)


@triton.jit
def _fold(count, mean, m2, AXIS: tl.constexpr):
    """Joins (count, mean, sum of squared deviations) along an axis (Chan et al. 1979, equation 2.1)."""
    total = tl.sum(count, AXIS)
    whole = tl.sum(count * mean, AXIS) / tl.maximum(total, 1)
    delta = mean - tl.expand_dims(whole, AXIS)
    return total, whole, tl.sum(m2 + count * delta * delta, AXIS)


@triton.jit
def _activate(y, SILU: tl.constexpr):
    if SILU:
        y = y / (1 + tl.exp(-y))
    return y


@triton.jit
def _result(y, out, code_scale):
    """In the dtype of out; with code_scale, fp32 (), the bytes of the e4m3 codes of y / code_scale."""
    if code_scale is None:
        return y.to(out.dtype.element_ty)
    else:
        v = (y / tl.load(code_scale)).to(tl.float32)
        return tl.where(v == v, e4m3(v), 0x7F).to(tl.uint8)  # NaN stays one


@triton.jit
def one_pass_kernel(x, out, code_scale, shift, weight, bias, groups, size, spatial, stride_n, stride_c, stride_s,
                    shift_n, shift_c, weight_stride, bias_stride, EPS: tl.constexpr, SILU: tl.constexpr,
                    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """x, out: (N, groups * size, spatial) of equal strides. shift: (N, C), weight, bias: (C,), or None. code_scale:
    None, or fp32 (): out is then bytes.

    A program is one group of one batch element; its tile (BLOCK_S, BLOCK_C) covers (spatial, size).
    """
    pid = tl.program_id(0)
    n = (pid // groups).to(tl.int64)
    group = pid % groups
    s = tl.arange(0, BLOCK_S)
    local = tl.arange(0, BLOCK_C)
    c = group * size + local
    valid = local < size
    mask = (s < spatial)[:, None] & valid[None, :]
    base = n * stride_n + group.to(tl.int64) * size * stride_c
    offset = s[:, None] * stride_s + local[None, :] * stride_c
    y = tl.load(x + base + offset, mask, other=0).to(ACC)
    if shift is not None:
        y += tl.load(shift + n * shift_n + c * shift_c, valid, other=0).to(ACC)[None, :]
    count = size * spatial
    y = tl.where(mask, y - tl.sum(tl.sum(tl.where(mask, y, 0), 0), 0) / count, 0)
    rest = tl.sum(tl.sum(y, 0), 0) / count  # rounding of a large mean: what it left, removed too
    variance = tl.sum(tl.sum(y * y, 0), 0) / count - rest * rest
    y = (y - rest) * tl.rsqrt(variance + EPS)
    if weight is not None:
        y *= tl.load(weight + c * weight_stride, valid, other=0).to(ACC)[None, :]
    if bias is not None:
        y += tl.load(bias + c * bias_stride, valid, other=0).to(ACC)[None, :]
    tl.store(out + base + offset, _result(_activate(y, SILU), out, code_scale), mask)


@triton.jit
def stats_kernel(x, shift, partial, channels, spatial, stride_n, stride_c, stride_s, shift_n, shift_c, tiles, splits,
                 rows, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """partial: (N, splits, 2, channels): mean and sum of squared deviations of x + shift, by channel and piece.

    A program is one piece (rows positions) of one tile of channels of one batch element.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    split = (pid // tiles) % splits
    n = (pid // tiles // splits).to(tl.int64)
    first = split * rows
    length = tl.minimum(rows, spatial - first)
    s = tl.arange(0, BLOCK_S)
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < channels
    pointer = (x + n * stride_n + first.to(tl.int64) * stride_s + tile.to(tl.int64) * BLOCK_C * stride_c
               + s[:, None] * stride_s + tl.arange(0, BLOCK_C)[None, :] * stride_c)
    mean = tl.zeros([BLOCK_S, BLOCK_C], ACC)
    m2 = tl.zeros([BLOCK_S, BLOCK_C], ACC)
    for start in range(0, length, BLOCK_S):
        mask = (start + s < length)[:, None] & valid[None, :]
        value = tl.load(pointer, mask, other=0).to(ACC)
        delta = value - mean
        after = mean + delta * (tl.full([], 1, ACC) / (start // BLOCK_S + 1))
        m2 = tl.where(mask, m2 + delta * (value - after), m2)
        mean = tl.where(mask, after, mean)
        pointer += BLOCK_S * stride_s
    count = ((length - s + BLOCK_S - 1) // BLOCK_S).to(ACC)[:, None] + tl.zeros([BLOCK_S, BLOCK_C], ACC)
    _, whole, square = _fold(count, mean, m2, 0)
    if shift is not None:
        whole += tl.load(shift + n * shift_n + c * shift_c, valid, other=0).to(ACC)
    target = partial + (n * splits + split) * 2 * channels + c
    tl.store(target, whole, valid)
    tl.store(target + channels, square, valid)


@triton.jit
def finish_kernel(partial, stats, groups, size, spatial, splits, rows, EPS: tl.constexpr, BLOCK: tl.constexpr,
                  ACC: tl.constexpr):
    """stats: (N, groups, 2): mean and 1 / sqrt(variance + EPS), joined from partial (N, splits, 2, groups * size)."""
    pid = tl.program_id(0)
    n = (pid // groups).to(tl.int64)
    group = pid % groups
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], ACC)
    mean = tl.zeros([BLOCK], ACC)
    m2 = tl.zeros([BLOCK], ACC)
    for start in range(0, splits * size, BLOCK):
        i = start + lane
        mask = i < splits * size
        split = i // size
        source = partial + (n * splits + split) * 2 * (groups * size) + group * size + i % size
        more = tl.where(mask, tl.minimum(rows, spatial - split * rows), 0).to(ACC)
        delta = tl.load(source, mask, other=0) - mean
        square = tl.load(source + groups * size, mask, other=0)
        total = tl.maximum(count + more, 1)
        m2 += tl.where(mask, square + delta * delta * (count * more / total), 0)
        mean += delta * (more / total)
        count += more
    total, whole, square = _fold(count, mean, m2, 0)
    tl.store(stats + pid * 2, whole)
    tl.store(stats + pid * 2 + 1, tl.rsqrt(square / total + EPS))


@triton.jit
def apply_kernel(x, out, code_scale, shift, weight, bias, stats, channels, size, spatial, stride_n, stride_c, stride_s,
                 shift_n, shift_c, weight_stride, bias_stride, tiles, splits, rows, SILU: tl.constexpr,
                 BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """Normalises with stats (N, channels / size, 2); x, out, code_scale, shift, weight, bias and the grid as above."""
    pid = tl.program_id(0)
    tile = pid % tiles
    split = (pid // tiles) % splits
    n = (pid // tiles // splits).to(tl.int64)
    first = split * rows
    length = tl.minimum(rows, spatial - first)
    s = tl.arange(0, BLOCK_S)
    local = tl.arange(0, BLOCK_C)
    c = tile * BLOCK_C + local
    valid = c < channels
    group = stats + (n * (channels // size) + c // size) * 2
    mean = tl.load(group, valid, other=0)
    factor = tl.load(group + 1, valid, other=0)
    if shift is not None:
        mean -= tl.load(shift + n * shift_n + c * shift_c, valid, other=0).to(ACC)
    if weight is not None:
        factor *= tl.load(weight + c * weight_stride, valid, other=0).to(ACC)
    base = n * stride_n + first.to(tl.int64) * stride_s + tile.to(tl.int64) * BLOCK_C * stride_c
    offset = s[:, None] * stride_s + local[None, :] * stride_c
    for start in range(0, length, BLOCK_S):
        mask = (start + s < length)[:, None] & valid[None, :]
        y = (tl.load(x + base + offset, mask, other=0).to(ACC) - mean[None, :]) * factor[None, :]
        if bias is not None:
            y += tl.load(bias + c * bias_stride, valid, other=0).to(ACC)[None, :]
        tl.store(out + base + offset, _result(_activate(y, SILU), out, code_scale), mask)
        base += BLOCK_S * stride_s


def layout_of(x: Tensor) -> torch.memory_format:
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == rank and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def launch(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
           silu: bool, *, config: Config | None = None) -> Tensor:
    """x: (N, C, *spatial) floating; shift: (N, C); weight, bias: (C,) -> x's shape, dtype and layout."""
    out = torch.empty_like(x, memory_format=layout_of(x))
    start(x, out, None, shift, num_groups, weight, bias, eps, silu, config)
    return out


def start(x: Tensor, out: Tensor, code_scale: Tensor | None, shift: Tensor | None, num_groups: int,
          weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, config: Config | None) -> None:
    """Fills out, of x's shape and layout: with the result, or where code_scale () is given with its bytes of codes."""
    if out.numel() == 0:
        return
    layout = layout_of(x)
    x = x.contiguous(memory_format=layout)
    n, c = x.shape[:2]
    spatial = x[0, 0].numel()
    last = layout != torch.contiguous_format
    strides = (c * spatial, 1, c) if last else (c * spatial, spatial, 1)
    largest = 16384 if code_scale is None else 8192
    config = config or heuristic(c, spatial, num_groups, last, processors(x), largest)
    size, acc = c // num_groups, accumulator(x)
    conditions = (*((0, 0) if shift is None else shift.stride()),)
    affine = [0 if p is None else p.stride(0) for p in (weight, bias)]
    blocks = {"BLOCK_S": config.block_spatial, "BLOCK_C": config.block_channels, "ACC": acc,
              "num_warps": config.num_warps}
    with torch.cuda.device_of(x):
        if config.one_pass:
            one_pass_kernel[(n * num_groups,)](x, out, code_scale, shift, weight, bias, num_groups, size, spatial,
                                               *strides, *conditions, *affine, EPS=eps, SILU=silu, **blocks)
            return
        tiles = triton.cdiv(c, config.block_channels)
        rows = triton.cdiv(triton.cdiv(spatial, config.splits), config.block_spatial) * config.block_spatial
        splits = triton.cdiv(spatial, rows)  # rounding rows up to whole tiles may leave the last programs nothing
        statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
        partial = torch.empty((n, splits, 2, c), dtype=statistics, device=x.device)
        stats = torch.empty((n, num_groups, 2), dtype=statistics, device=x.device)
        grid = (n * splits * tiles,)
        stats_kernel[grid](x, shift, partial, c, spatial, *strides, *conditions, tiles, splits, rows, **blocks)
        finish_kernel[(n * num_groups,)](partial, stats, num_groups, size, spatial, splits, rows, EPS=eps,
                                         BLOCK=FINISH_BLOCK, ACC=acc, num_warps=4)
        apply_kernel[grid](x, out, code_scale, shift, weight, bias, stats, c, size, spatial, *strides, *conditions,
                           *affine, tiles, splits, rows, SILU=silu, **blocks)
