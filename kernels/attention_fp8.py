"""attention_fp8: attention on e4m3 codes of q, of the keys less their mean, of v and of the weights.

As attention.py, with products of 8 bits: scores are (q codes . k codes) * scale of the query * scale of the key;
weights, at most 1, are rounded at 256 times their size, so that the smallest normal code is 2^-14; v lies with its
tokens side by side, as the matrix unit wants its second factor. A tile's products with v start from zero and are added
in fp32: Hopper's unit keeps 14 bits of a sum of e4m3 products (DeepSeek-AI 2024, section 3.3.2).
"""

from __future__ import annotations

import importlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import quantize_rowwise
from ._common import power_of_two
from ._row_codes import e4m3
from .attention import Config

LEAST_DOT = 32  # shortest depth of a product of e4m3 numbers
_ROOM = 16  # tokens of v's rows in memory are a multiple of this: whole loads of 16 bytes


def split_depth(depth: int) -> tuple[int, int]:
    """Two block sizes that cover a head dimension: (64, 32) for 80, (128, 32) for 160, (64, 0) for 40."""
    whole = max(power_of_two(depth), LEAST_DOT)
    rest = max(power_of_two(depth - whole // 2), LEAST_DOT)
    return (whole // 2, rest) if LEAST_DOT < whole != depth and rest < whole // 2 else (whole, 0)


def heuristic(depth: int, queries: int) -> Config:
    """Chosen by compiling for sm_90 and sm_100 and keeping the largest tiles without spills; none has been timed."""
    block_m = 128 if depth <= 160 else 64 if depth <= 256 else 32
    block_n = 64 if depth <= 128 else 32
    while block_m > 16 and block_m >= 2 * queries:
        block_m //= 2  # a short sequence would only pad
    return Config(block_m, block_n, 8 if block_m >= 64 or depth > 160 else 4, 3 if depth <= 160 else 2)


@triton.jit
def _rows(pointer, token, tokens, DEPTH: tl.constexpr, stride, START: tl.constexpr, BLOCK: tl.constexpr):
    """(tokens of this block, BLOCK) codes of the head dimension from START on; zero outside."""
    d = START + tl.arange(0, BLOCK)
    return tl.load(pointer + token[:, None] * stride + d[None, :], (token < tokens)[:, None] & (d < DEPTH)[None, :],
                   other=0.0)


@triton.jit
def _columns(pointer, token, tokens, DEPTH: tl.constexpr, room, START: tl.constexpr, BLOCK: tl.constexpr):
    """The same of codes whose tokens are adjacent, as (BLOCK, tokens of this block)."""
    d = START + tl.arange(0, BLOCK)
    return tl.load(pointer + d[:, None] * room + token[None, :], (token < tokens)[None, :] & (d < DEPTH)[:, None],
                   other=0.0)


@triton.jit
def kernel(q, k, v, q_scale, k_scale, v_scale, out, heads, repeat, queries, keys, room, unit, mask_block, blocks,
           DEPTH: tl.constexpr, DEPTH_V: tl.constexpr, CAUSAL: tl.constexpr, QK: tl.constexpr, QK_REST: tl.constexpr,
           PV: tl.constexpr, PV_REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
           BY_HAND: tl.constexpr):
    """Codes, dense: q (B, queries, heads, depth), k (B, keys, kv_heads, depth), v (B, kv_heads, depth_v, room), with
    repeat = heads / kv_heads and room >= keys. Their scales, fp32: (B, queries, heads), (B, keys, kv_heads),
    (B, kv_heads, depth_v). out: (B, queries, heads, depth_v). unit: the scale of the scores in units of log2. Query i
    sees the keys below (i' // mask_block + 1) * mask_block with i' = i + keys - queries >= 0. BY_HAND: for Triton's
    interpreter, whose conversion loses the carry out of the fraction.
    """
    pid = tl.program_id(0)
    block = blocks - 1 - pid % blocks  # under a causal mask the last queries have the most work: start them first
    head = (pid // blocks) % heads
    b = (pid // blocks // heads).to(tl.int64)
    first = block * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    kv_heads = heads // repeat
    kv_head = head // repeat
    there = first + row < queries
    q += ((b * queries + first) * heads + head) * DEPTH
    q_scale += (b * queries + first) * heads + head
    k += (b * keys * kv_heads + kv_head) * DEPTH
    k_scale += b * keys * kv_heads + kv_head
    v += (b * kv_heads + kv_head) * DEPTH_V * room
    v_scale += (b * kv_heads + kv_head) * DEPTH_V
    tile = _rows(q, row, queries - first, DEPTH, heads * DEPTH, 0, QK)
    tile_rest = tile
    if QK_REST > 0:
        tile_rest = _rows(q, row, queries - first, DEPTH, heads * DEPTH, QK, QK_REST)
    query_unit = tl.load(q_scale + row * heads, there, other=0) * unit
    limit = tl.zeros([BLOCK_M], tl.int32) + keys
    high = keys
    if CAUSAL:
        position = first + row + (keys - queries)
        limit = tl.where(position >= 0, tl.minimum((position // mask_block + 1) * mask_block, keys), 0)
        high = tl.max(tl.where(there, limit, 0), 0)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    result = tl.zeros([BLOCK_M, PV], tl.float32)
    result_rest = result
    if PV_REST > 0:
        result_rest = tl.zeros([BLOCK_M, PV_REST], tl.float32)
    for start in range(0, high, BLOCK_N):
        left = keys - start
        key = _rows(k, n, left, DEPTH, kv_heads * DEPTH, 0, QK)
        score = tl.dot(tile, tl.trans(key))
        if QK_REST > 0:
            key = _rows(k, n, left, DEPTH, kv_heads * DEPTH, QK, QK_REST)
            score = tl.dot(tile_rest, tl.trans(key), score)
        score = score * query_unit[:, None] * tl.load(k_scale + n * kv_heads, n < left, other=0)[None, :]
        score = tl.where((start + n)[None, :] < limit[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key seen yet: -inf - -inf would be NaN
        weight = tl.exp2(score - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weight, 1)
        top = higher
        weight *= 256.0
        if BY_HAND:
            weight = e4m3(weight).to(tl.float8e4nv, bitcast=True)
        else:
            weight = weight.to(tl.float8e4nv)
        value = _columns(v, n, left, DEPTH_V, room, 0, PV)
        result = result * decay[:, None] + tl.dot(weight, tl.trans(value))
        if PV_REST > 0:
            value = _columns(v, n, left, DEPTH_V, room, PV, PV_REST)
            result_rest = result_rest * decay[:, None] + tl.dot(weight, tl.trans(value))
        k += BLOCK_N * kv_heads * DEPTH
        k_scale += BLOCK_N * kv_heads
        v += BLOCK_N
    inverse = 0.00390625 / tl.where(total == 0, 1.0, total)
    out += ((b * queries + first) * heads + head) * DEPTH_V
    here = row[:, None].to(tl.int64) * heads * DEPTH_V
    d = tl.arange(0, PV)
    factor = tl.load(v_scale + d, d < DEPTH_V, other=0)[None, :] * inverse[:, None]
    tl.store(out + here + d[None, :], (result * factor).to(out.dtype.element_ty),
             there[:, None] & (d < DEPTH_V)[None, :])
    if PV_REST > 0:
        d = PV + tl.arange(0, PV_REST)
        factor = tl.load(v_scale + d, d < DEPTH_V, other=0)[None, :] * inverse[:, None]
        tl.store(out + here + d[None, :], (result_rest * factor).to(out.dtype.element_ty),
                 there[:, None] & (d < DEPTH_V)[None, :])


def launch(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, block_size: int, *,
           config: Config | None = None) -> Tensor:
    """q: (B, Tq, H, D); k: (B, Tk, Hk, D); v: (B, Tk, Hk, Dv), floating -> (B, Tq, H, Dv), dense. fp64 takes the
    reference."""
    op = importlib.import_module("ldmfast.ops.attention_fp8")
    b, queries, heads, depth = q.shape
    keys, kv_heads, depth_v = k.shape[1], k.shape[2], v.shape[3]
    if b * queries * heads * depth_v == 0 or keys == 0:
        return q.new_zeros((b, queries, heads, depth_v))
    if q.dtype == torch.float64:
        return op.reference(q, k, v, scale, causal, block_size)
    room = triton.cdiv(keys, _ROOM) * _ROOM
    values = v.new_zeros(b, kv_heads, depth_v, room)
    values[..., :keys] = op.columns(v)
    (qc, qs), (kc, ks), (vc, vs) = (quantize_rowwise.launch(x, True) for x in (q, op.centred(k), values))
    out = q.new_empty((b, queries, heads, depth_v))
    (qk, qk_rest), (pv, pv_rest) = split_depth(depth), split_depth(depth_v)
    config = config or heuristic(max(qk + qk_rest, pv + pv_rest), queries)
    blocks = triton.cdiv(queries, config.block_m)
    by_hand = not isinstance(kernel, triton.runtime.JITFunction)
    with torch.cuda.device_of(q):
        kernel[(blocks * heads * b,)](
            qc, kc, vc, qs, ks, vs, out, heads, heads // kv_heads, queries, keys, room, scale * math.log2(math.e),
            min(block_size, keys), blocks, DEPTH=depth, DEPTH_V=depth_v, CAUSAL=causal, QK=qk, QK_REST=qk_rest, PV=pv,
            PV_REST=pv_rest, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BY_HAND=by_hand,
            num_warps=config.num_warps, num_stages=config.num_stages)
    return out
