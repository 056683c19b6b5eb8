"""attention: out = softmax(scale * q k^T + mask) v, one pass over the keys (Dao et al. 2022, algorithm 1).

Every program owns BLOCK_M queries of one head and walks the keys in blocks of BLOCK_N with a running maximum, a
running sum and fp32 accumulators. A head dimension that is not a power of two is split into two parts, so that 80 is
64 + 16 and 160 is 128 + 32, not 128 and 256: the tensor cores then work on the true depth.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _attention_choice
from ._common import power_of_two, shared_memory

OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LEAST_DOT = 16  # shortest side of a matrix instruction's operand


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def split_depth(depth: int) -> tuple[int, int]:
    """Two block sizes that cover a head dimension: (256, 0) for 256, (128, 32) for 160, (32, 16) for 40."""
    whole = max(power_of_two(depth), LEAST_DOT)
    if whole == depth or whole <= LEAST_DOT:
        return whole, 0
    rest = max(power_of_two(depth - whole // 2), LEAST_DOT)
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def heuristic(depth: int, queries: int, element_size: int, shared: int, biased: bool) -> Config:
    """depth: the wider of the padded head dimensions of q and v; shared: bytes of shared memory a block may use.

    Chosen by compiling for sm_80, sm_90 and sm_100 and keeping the largest tiles without register spills; none of
    them has been timed.
    """
    if element_size == 4:  # exact products run on the plain units, operands in registers: small tiles
        if depth <= 80:
            return Config(32, 32, 4, 1)
        return Config(16, 32 if depth <= 128 else 16, 4 if depth <= 160 else 8, 1)
    if depth <= 128:  # 128 x 128 fp32 accumulators over 8 warps: 64 registers a thread
        block_m, block_n = 128, 32 if biased else 64  # addresses and values of a 128 x 64 bias tile spill
    elif depth <= 160:
        block_m, block_n = 64 if biased else 128, 32  # 80 registers of accumulators leave none for wider scores
    else:
        block_m, block_n = 64 if depth <= 256 else 32, 32  # 64 registers of accumulators in both
    while block_m > 16 and block_m >= 2 * queries:
        block_m //= 2  # a short sequence would only pad
    stages = 3
    while stages > 1 and element_size * depth * (block_m + 2 * stages * block_n) > shared:
        stages -= 1  # the query tile and `stages` key and value tiles live in shared memory
    return Config(block_m, block_n, 8 if block_m >= 64 or depth > 160 else 4, stages)


@triton.jit
def _load(pointer, token, tokens, DEPTH: tl.constexpr, stride, START: tl.constexpr, BLOCK: tl.constexpr):
    """(tokens of this block, BLOCK) elements of the head dimension from START on; zero outside."""
    d = START + tl.arange(0, BLOCK)
    return tl.load(pointer + token[:, None] * stride + d[None, :], (token < tokens)[:, None] & (d < DEPTH)[None, :],
                   other=0)


@triton.jit
def _attend(q, q_rest, total, top, out, out_rest, k, v, bias, row, limit, low, high, keys, stride_k, stride_v,
            bias_m, bias_n, scale, DEPTH: tl.constexpr, DEPTH_V: tl.constexpr, MASKED: tl.constexpr,
            QK: tl.constexpr, QK_REST: tl.constexpr,
            PV: tl.constexpr, PV_REST: tl.constexpr, BLOCK_N: tl.constexpr, OPERAND: tl.constexpr,
            PRECISION: tl.constexpr):
    """Runs over the keys low..high-1. limit: for each query, the number of keys it sees; used where MASKED.

    Weights are rounded to v's dtype; OPERAND is the dtype in which the matrix unit takes its operands.
    """
    n = tl.arange(0, BLOCK_N)
    skip = tl.full([], 0, tl.int64) + low  # a constant where there is one key: it has no .to
    k += skip * stride_k
    v += skip * stride_v
    if bias is not None:
        bias += skip * bias_n
    for start in range(low, high, BLOCK_N):
        left = keys - start
        key = _load(k, n, left, DEPTH, stride_k, 0, QK).to(OPERAND)
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if QK_REST > 0:
            key = _load(k, n, left, DEPTH, stride_k, QK, QK_REST).to(OPERAND)
            score = tl.dot(q_rest, tl.trans(key), score, input_precision=PRECISION)
        score *= scale
        if bias is not None:
            source = bias + row[:, None] * bias_m + n[None, :] * bias_n
            seen = (start + n)[None, :] < limit[:, None]
            score += tl.load(source, seen, other=0).to(tl.float32) * 1.4426950408889634
        if MASKED:
            score = tl.where((start + n)[None, :] < limit[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen yet: -inf - -inf would be NaN
        weight = tl.exp2(score - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weight, 1)
        top = higher
        weight = weight.to(v.dtype.element_ty).to(OPERAND)
        value = _load(v, n, left, DEPTH_V, stride_v, 0, PV).to(OPERAND)
        out = tl.dot(weight, value, out * decay[:, None], input_precision=PRECISION)
        if PV_REST > 0:
            value = _load(v, n, left, DEPTH_V, stride_v, PV, PV_REST).to(OPERAND)
            out_rest = tl.dot(weight, value, out_rest * decay[:, None], input_precision=PRECISION)
        k += BLOCK_N * stride_k
        v += BLOCK_N * stride_v
        if bias is not None:
            bias += BLOCK_N * bias_n
    return total, top, out, out_rest


@triton.jit
def kernel(q, k, v, bias, out, heads, repeat, queries, keys, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t,
           v_h, bias_b, bias_h, bias_m, bias_n, scale, mask_block, blocks, DEPTH: tl.constexpr, DEPTH_V: tl.constexpr,
           ALIGN: tl.constexpr, CAUSAL: tl.constexpr, QK: tl.constexpr,
           QK_REST: tl.constexpr, PV: tl.constexpr, PV_REST: tl.constexpr, BLOCK_M: tl.constexpr,
           BLOCK_N: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """q: (B, queries, heads, depth); k, v: (B, keys, heads / repeat, depth or depth_v); out: (B, queries, heads,
    depth_v) dense; bias: strides of (B, heads, queries, keys), 0 where it broadcasts, or None. scale: in units of
    log2. Query i sees the keys below (i' // mask_block + 1) * mask_block with i' = i + keys - queries >= 0.
    """
    pid = tl.program_id(0)
    block = blocks - 1 - pid % blocks  # under a causal mask the last queries have the most work: start them first
    head = (pid // blocks) % heads
    b = (pid // blocks // heads).to(tl.int64)
    first = block * BLOCK_M
    q_b, q_t, q_h = q_b * ALIGN, q_t * ALIGN, q_h * ALIGN
    k_b, k_t, k_h = k_b * ALIGN, k_t * ALIGN, k_h * ALIGN
    v_b, v_t, v_h = v_b * ALIGN, v_t * ALIGN, v_h * ALIGN
    row = tl.arange(0, BLOCK_M)
    kv_head = (head // repeat).to(tl.int64)
    q += b * q_b + head.to(tl.int64) * q_h + first.to(tl.int64) * q_t
    k += b * k_b + kv_head * k_h
    v += b * v_b + kv_head * v_h
    tile = _load(q, row, queries - first, DEPTH, q_t, 0, QK).to(OPERAND)
    tile_rest = tile
    if QK_REST > 0:
        tile_rest = _load(q, row, queries - first, DEPTH, q_t, QK, QK_REST).to(OPERAND)
    limit = tl.zeros([BLOCK_M], tl.int32) + keys
    high = keys
    full = keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        position = first + row + (keys - queries)
        limit = tl.where(position >= 0, tl.minimum((position // mask_block + 1) * mask_block, keys), 0)
        high = tl.max(tl.where(first + row < queries, limit, 0), 0)
        full = tl.min(limit, 0) // BLOCK_N * BLOCK_N
    if bias is not None:
        bias += b * bias_b + head.to(tl.int64) * bias_h + first.to(tl.int64) * bias_m
        limit = tl.where(first + row < queries, limit, 0)  # rows past the end have no bias to read
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    result = tl.zeros([BLOCK_M, PV], tl.float32)
    result_rest = result
    if PV_REST > 0:
        result_rest = tl.zeros([BLOCK_M, PV_REST], tl.float32)
    total, top, result, result_rest = _attend(
        tile, tile_rest, total, top, result, result_rest, k, v, bias, row, limit, full * 0, full, keys, k_t, v_t,
        bias_m, bias_n, scale, DEPTH, DEPTH_V, False, QK, QK_REST, PV, PV_REST, BLOCK_N, OPERAND, PRECISION)
    total, top, result, result_rest = _attend(
        tile, tile_rest, total, top, result, result_rest, k, v, bias, row, limit, full, high, keys, k_t, v_t,
        bias_m, bias_n, scale, DEPTH, DEPTH_V, True, QK, QK_REST, PV, PV_REST, BLOCK_N, OPERAND, PRECISION)
    inverse = 1 / tl.where(total == 0, 1.0, total)
    d = tl.arange(0, PV)
    out += ((b * queries + first) * heads + head) * DEPTH_V
    target = out + row[:, None].to(tl.int64) * heads * DEPTH_V + d[None, :]
    here = (first + row < queries)[:, None]
    tl.store(target, (result * inverse[:, None]).to(out.dtype.element_ty), here & (d < DEPTH_V)[None, :])
    if PV_REST > 0:
        d = PV + tl.arange(0, PV_REST)
        target = out + row[:, None].to(tl.int64) * heads * DEPTH_V + d[None, :]
        tl.store(target, (result_rest * inverse[:, None]).to(out.dtype.element_ty),
                 here & (d < DEPTH_V)[None, :])


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def launch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool, block_size: int, *,
           config: Config | None = None, backend: str | None = None) -> Tensor:
    """q: (B, Tq, H, D); k: (B, Tk, Hk, D); v: (B, Tk, Hk, Dv); bias: (B or 1, H or 1, Tq or 1, Tk or 1) or None.

    Returns (B, Tq, H, Dv), dense. fp64 has no kernel and takes the reference. backend: "triton", "mma", "wgmma" or
    "sdpa" instead of what _attention_choice.py chooses; a config is Triton's.
    """
    if q.dtype == torch.float64:
        return importlib.import_module("ldmfast.ops.attention").reference(q, k, v, bias, scale, causal, block_size)
    b, queries, heads, depth = q.shape
    keys, depth_v = k.shape[1], v.shape[3]
    if b * queries * heads * depth_v == 0 or keys == 0:
        return q.new_zeros((b, queries, heads, depth_v))
    if backend is None and config is None:
        backend = _attention_choice.choice_of(q, k, v, bias is not None, scale, causal, block_size).backend
    if backend not in (None, "triton"):
        return _attention_choice.run(backend, q, k, v, scale, causal, block_size)
    q, k, v = _unit_last(q), _unit_last(k), _unit_last(v)
    out = q.new_empty((b, queries, heads, depth_v))
    bias_strides = (0, 0, 0, 0)
    if bias is not None:
        bias_strides = bias.expand(b, heads, queries, keys).stride()
    qk, qk_rest = split_depth(depth)
    pv, pv_rest = split_depth(depth_v)
    config = config or heuristic(max(qk + qk_rest, pv + pv_rest), queries, q.element_size(), shared_memory(q),
                                 bias is not None)
    compiled = isinstance(kernel, triton.runtime.JITFunction)
    operand = OPERANDS[q.dtype] if compiled else tl.float32  # the interpreter multiplies bf16 as if it were integers
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]]
    align = math.gcd(16 // q.element_size(), *strides)  # 40 is a multiple of 8, which Triton would not see by itself
    blocks = triton.cdiv(queries, config.block_m)
    with torch.cuda.device_of(q):
        kernel[(blocks * heads * b,)](
            q, k, v, bias, out, heads, heads // k.shape[2], queries, keys, *(s // align for s in strides),
            *bias_strides, scale * math.log2(math.e), min(block_size, keys), blocks, DEPTH=depth, DEPTH_V=depth_v,
            ALIGN=align, CAUSAL=causal, QK=qk, QK_REST=qk_rest, PV=pv, PV_REST=pv_rest, BLOCK_M=config.block_m,
            BLOCK_N=config.block_n, OPERAND=operand, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=config.num_warps, num_stages=config.num_stages)
    return out
