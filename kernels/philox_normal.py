"""philox_normal: what torch's CUDA generator draws. Thread i of S draws numbers i, i + S, i + 2 S and i + 3 S of each
piece of 4 S in one call of Philox4x32-10; the count of calls is the counter's lower half, i the upper one.

The fp64 operations are those of csrc/common/philox.h, one by one and never fused, so that the bits are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

DRAWING_BLOCK = 256  # threads of a block of torch's kernels that draw


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int


def heuristic() -> Config:
    return Config(256, 4)  # two calls a thread: fp64 arithmetic hides nothing behind more of them


@triton.jit
def _rounded(x):
    return x.to(tl.float32).to(tl.float64)


@triton.jit
def _log(x):
    """Of a positive normal x: e ln 2 + 2 atanh(t), x = m 2^e, sqrt(1/2) <= m < sqrt(2), t = (m - 1) / (m + 1)."""
    bits = x.to(tl.int64, bitcast=True)
    e = (bits - 0x3FE6A09E667F3BCD) >> 52
    m = (bits - (e << 52)).to(tl.float64, bitcast=True)
    t = (m - 1.0) / (m + 1.0)
    z = t * t
    p = z * (1.0 / 15) + 1.0 / 13
    p = p * z + 1.0 / 11
    p = p * z + 1.0 / 9
    p = p * z + 1.0 / 7
    p = p * z + 1.0 / 5
    p = p * z + 1.0 / 3
    p = p * z + 1.0
    return e.to(tl.float64) * 0.6931471805599453 + 2.0 * (t * p)


@triton.jit
def _sine_cosine(x):
    """For 0 <= x <= 7: Taylor's series around the nearest quarter of a turn."""
    shifted = x * 0.6366197723675814 + 6755399441055744.0  # 1.5 * 2^52: no room for a fraction
    r = x - (shifted - 6755399441055744.0) * 1.5707963267948966
    z = r * r
    s = z * (-1.0 / 1307674368000) + 1.0 / 6227020800
    s = s * z - 1.0 / 39916800
    s = s * z + 1.0 / 362880
    s = s * z - 1.0 / 5040
    s = s * z + 1.0 / 120
    s = s * z - 1.0 / 6
    s = s * z + 1.0
    s = s * r
    c = z * (-1.0 / 87178291200) + 1.0 / 479001600
    c = c * z - 1.0 / 3628800
    c = c * z + 1.0 / 40320
    c = c * z - 1.0 / 720
    c = c * z + 1.0 / 24
    c = c * z - 1.0 / 2
    c = c * z + 1.0
    quarter = shifted.to(tl.int64, bitcast=True) & 3
    even = (quarter & 1) == 0
    one = tl.where(even, s, c)
    other = tl.where(even, c, s)
    return tl.where(quarter >= 2, -one, one), tl.where(((quarter + 1) & 2) != 0, -other, other)


@triton.jit
def _box_muller(first, second):
    """Two normal numbers from two words, arguments of logarithm and sine rounded to fp32 as in cuRAND."""
    u = _rounded(_rounded(first.to(tl.float64)) * 2.3283064365386963e-10 + 1.1641532182693481e-10)  # 2^-32, 2^-33
    v = _rounded(_rounded(second.to(tl.float64)) * 1.462918119976564e-09 + 7.31459059988282e-10)  # fp32 2 pi / 2^32
    radius = tl.sqrt(-2.0 * _log(u))
    sine, cosine = _sine_cosine(v)
    return (radius * sine).to(tl.float32), (radius * cosine).to(tl.float32)


@triton.jit
def kernel(state, out, count, threads, calls, tiles, state_n, state_c, BLOCK: tl.constexpr):
    """state: (N, 2) int64, seed and offset. out: (N, count) fp32. Program: BLOCK threads of one call of one state."""
    pid = tl.program_id(0)
    thread = (pid % tiles) * BLOCK + tl.arange(0, BLOCK)
    call = (pid // tiles) % calls
    n = (pid // tiles // calls).to(tl.int64)
    seed = tl.load(state + n * state_n)
    step = ((tl.load(state + n * state_n + state_c) >> 2) & 0x3FFFFFFFFFFFFFFF) + call
    zero = thread.to(tl.uint32) * 0
    a = zero + (step & 0xFFFFFFFF).to(tl.uint32)
    b = zero + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c = thread.to(tl.uint32)
    d = zero
    k = zero + (seed & 0xFFFFFFFF).to(tl.uint32)
    m = zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        one = a.to(tl.uint64) * 0xD2511F53
        two = c.to(tl.uint64) * 0xCD9E8D57
        a = (two >> 32).to(tl.uint32) ^ b ^ k
        b = (two & 0xFFFFFFFF).to(tl.uint32)
        c = (one >> 32).to(tl.uint32) ^ d ^ m
        d = (one & 0xFFFFFFFF).to(tl.uint32)
        k = ((k.to(tl.uint64) + 0x9E3779B9) & 0xFFFFFFFF).to(tl.uint32)
        m = ((m.to(tl.uint64) + 0xBB67AE85) & 0xFFFFFFFF).to(tl.uint32)
    inside = thread < threads
    at = call.to(tl.int64) * 4 * threads + thread
    target = out + n * count
    number, next_number = _box_muller(a, b)
    tl.store(target + at, number, inside & (at < count))
    at += threads
    tl.store(target + at, next_number, inside & (at < count))
    at += threads
    number, next_number = _box_muller(c, d)
    tl.store(target + at, number, inside & (at < count))
    at += threads
    tl.store(target + at, next_number, inside & (at < count))


def launch(state: Tensor, count: int, threads: int, *, config: Config | None = None) -> Tensor:
    """state: (N, 2) int64; numbers of each, threads of the GPU imitated -> (N, count) fp32."""
    out = state.new_empty((state.shape[0], count), dtype=torch.float32)
    if out.numel() == 0:
        return out
    threads = min(threads, triton.cdiv(count, DRAWING_BLOCK) * DRAWING_BLOCK)
    calls = triton.cdiv(count, 4 * threads)
    config = config or heuristic()
    tiles = triton.cdiv(threads, config.block)
    with torch.cuda.device_of(state):
        kernel[(state.shape[0] * calls * tiles,)](
            state, out, count, threads, calls, tiles, *state.stride(), BLOCK=config.block, num_warps=config.num_warps,
            enable_fp_fusion=False)
    return out
