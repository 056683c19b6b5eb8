"""qk_norm_rope: y = x / sqrt(mean(x^2) + eps) * weight over each head of the queries and keys, then each pair (a, b) of
its channels becomes (a cos - b sin, b cos + a sin). One program reads one token of the text's or the image's packed
projection and writes it to its place among all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import accumulator, power_of_two


@dataclass(frozen=True)
class Config:
    block_heads: int
    num_warps: int


def heuristic(heads: int, depth: int) -> Config:
    block = min(power_of_two(heads), max(1, 4096 // power_of_two(depth)))  # 16 numbers a thread of 8 warps
    return Config(block, min(8, max(1, block * power_of_two(depth) // 512)))


@triton.jit
def _weighted(a, b, weight, j, seen, stride, HALF: tl.constexpr, PAIRS: tl.constexpr, ACC: tl.constexpr):
    """a, b: (heads, channels); weight: of one head, or None."""
    if weight is not None:
        first = 2 * j if PAIRS else j
        second = 2 * j + 1 if PAIRS else HALF + j
        a *= tl.load(weight + first * stride, seen, other=0).to(ACC)[None, :]
        b *= tl.load(weight + second * stride, seen, other=0).to(ACC)[None, :]
    return a, b


@triton.jit
def _turned(x, out, weight, weight_stride, cos, sin, h, heads, stride_h, EPS: tl.constexpr, PAIRS: tl.constexpr,
            HALF: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """x: one token's queries or keys, heads stride_h apart. out: the same, dense. cos, sin: of the token, or None."""
    j = tl.arange(0, BLOCK)
    seen = j < HALF
    d = tl.arange(0, 2 * BLOCK)
    there = (h < heads)[:, None]
    whole = there & (d < 2 * HALF)[None, :]
    if PAIRS:  # adjacent channels: read whole, so that loads are as wide as they can be
        both = tl.load(x + h[:, None] * stride_h + d[None, :], whole, other=0).to(ACC)
        a, b = tl.split(tl.reshape(both, (both.shape[0], BLOCK, 2)))
    else:
        source = x + h[:, None] * stride_h + j[None, :]
        a = tl.load(source, there & seen[None, :], other=0).to(ACC)
        b = tl.load(source + HALF, there & seen[None, :], other=0).to(ACC)
    if EPS is not None:
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + EPS)[:, None]
        a, b = _weighted(a * inverse, b * inverse, weight, j, seen, weight_stride, HALF, PAIRS, ACC)
    if cos is not None:
        c = tl.load(cos + j, seen, other=0).to(ACC)[None, :]
        s = tl.load(sin + j, seen, other=0).to(ACC)[None, :]
        turned = b * c + a * s
        a = a * c - b * s
        b = turned
    a = a.to(out.dtype.element_ty)
    b = b.to(out.dtype.element_ty)
    if PAIRS:
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * BLOCK))
        tl.store(out + h[:, None] * (2 * HALF) + d[None, :], both, whole)
    else:
        target = out + h[:, None] * (2 * HALF) + j[None, :]
        tl.store(target, a, there & seen[None, :])
        tl.store(target + HALF, b, there & seen[None, :])


@triton.jit
def _token(x, out, q_weight, k_weight, q_stride, k_stride, cos, sin, h, heads, stride_p, stride_h, PARTS: tl.constexpr,
           EPS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    _turned(x, out, q_weight, q_stride, cos, sin, h, heads, stride_h, EPS, PAIRS, HALF, BLOCK, ACC)
    part = heads * (2 * HALF)
    _turned(x + stride_p, out + part, k_weight, k_stride, cos, sin, h, heads, stride_h, EPS, PAIRS, HALF, BLOCK, ACC)
    if PARTS == 3:
        d = tl.arange(0, 2 * BLOCK)
        mask = (h < heads)[:, None] & (d < 2 * HALF)[None, :]
        value = tl.load(x + 2 * stride_p + h[:, None] * stride_h + d[None, :], mask, other=0)
        tl.store(out + 2 * part + h[:, None] * (2 * HALF) + d[None, :], value, mask)


@triton.jit
def kernel(qkv, context, out, q_weight, k_weight, context_q_weight, context_k_weight, cos, sin, q_stride, k_stride,
           context_q_stride, context_k_stride, total, text, heads, x_b, x_t, x_p, x_h, c_b, c_t, c_p, c_h, table_b,
           tiles, PARTS: tl.constexpr, EPS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
           BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """qkv: (B, total - text, 3, heads, 2 HALF), context: (B, text, 3, heads, 2 HALF) or None; strides x_ and c_.

    out: (B, total, PARTS, heads, 2 HALF), dense; PARTS is 3 with a context. weights: (2 HALF,) or None. cos, sin:
    (total, HALF), one table for each table_b numbers, or None. EPS: None for no norm.
    """
    pid = tl.program_id(0)
    h = ((pid % tiles) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    index = (pid // tiles).to(tl.int64)
    b = index // total
    t = index % total
    to = out + index * PARTS * heads * (2 * HALF)
    if cos is not None:
        cos += b * table_b + t * HALF
        sin += b * table_b + t * HALF
    if context is None:
        _token(qkv + b * x_b + t * x_t, to, q_weight, k_weight, q_stride, k_stride, cos, sin, h, heads, x_p, x_h, PARTS,
               EPS, PAIRS, HALF, BLOCK, ACC)
    else:
        if t < text:
            _token(context + b * c_b + t * c_t, to, context_q_weight, context_k_weight, context_q_stride,
                   context_k_stride, cos, sin, h, heads, c_p, c_h, PARTS, EPS, PAIRS, HALF, BLOCK, ACC)
        else:
            _token(qkv + b * x_b + (t - text) * x_t, to, q_weight, k_weight, q_stride, k_stride, cos, sin, h, heads,
                   x_p, x_h, PARTS, EPS, PAIRS, HALF, BLOCK, ACC)


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(qkv: Tensor, context: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
           context_q_weight: Tensor | None, context_k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
           interleaved: bool, eps: float | None, *, config: Config | None = None) -> Tensor:
    """qkv: (B, T, 3, H, D), context: (B, S, 3, H, D) or None; weights: (D,) or None; cos, sin: (S + T, D / 2) or
    (B or 1, S + T, D / 2), dense, or None -> (B, S + T, 3, H, D), or (B, T, 2, H, D) without context."""
    b, tokens, _, heads, depth = qkv.shape
    text = 0 if context is None else context.shape[1]
    parts = 2 if context is None else 3
    out = qkv.new_empty((b, text + tokens, parts, heads, depth))
    if out.numel() == 0:
        return out
    qkv = _unit_last(qkv)
    context = None if context is None else _unit_last(context)
    weights = (q_weight, k_weight, context_q_weight, context_k_weight)
    config = config or heuristic(heads, depth)
    tiles = triton.cdiv(heads, config.block_heads)
    each = cos is not None and cos.ndim == 3 and cos.shape[0] > 1
    with torch.cuda.device_of(qkv):
        kernel[(b * (text + tokens) * tiles,)](
            qkv, context, out, *weights, cos, sin, *(0 if w is None else w.stride(0) for w in weights), text + tokens,
            text, heads, *qkv.stride()[:4], *((0,) * 4 if context is None else context.stride()[:4]),
            cos.stride(0) if each else 0, tiles, PARTS=parts, EPS=eps, PAIRS=interleaved, HALF=depth // 2,
            BLOCK_H=config.block_heads, BLOCK=power_of_two(depth // 2), ACC=accumulator(qkv),
            num_warps=config.num_warps)
    return out
