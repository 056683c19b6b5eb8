"""attention: softmax(scale * q k^T + mask) v without the score matrix in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import LdmfastError, ShapeError
from ._faults import public
from ._op import LIBRARY, Case, Cost, Draw, Op, accumulator, case, nbytes, register, shape_of

_QUERY_CHUNK = 512  # the reference is also the fallback: bounds its score matrix


def visible(queries: int, keys: int, block_size: int, device: torch.device, first: int = 0) -> Tensor:
    """(queries, keys) bool: query i, numbered from ``first``, sees key j if j's block is not later."""
    i = torch.arange(first, first + queries, device=device)
    j = torch.arange(keys, device=device)
    return j[None] // block_size <= torch.div(i[:, None], block_size, rounding_mode="floor")


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool,
              block_size: int) -> Tensor:
    dtype = accumulator(q)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    if k.shape[1] == 0 or out.numel() == 0:
        return out.zero_()
    repeat = q.shape[2] // k.shape[2]
    keys = k.to(dtype).repeat_interleave(repeat, dim=2).permute(0, 2, 3, 1)  # (B, H, D, Tk)
    values = v.to(dtype).repeat_interleave(repeat, dim=2).transpose(1, 2)  # (B, H, Tk, D)
    for start in range(0, q.shape[1], _QUERY_CHUNK):
        rows = slice(start, start + _QUERY_CHUNK)
        queries = q[:, rows].to(dtype).transpose(1, 2)
        scores = scale * (queries @ keys)
        if bias is not None:
            scores = scores + (bias[:, :, rows] if bias.shape[2] != 1 else bias).to(dtype)
        if causal:
            first = start + k.shape[1] - q.shape[1]
            mask = visible(queries.shape[2], k.shape[1], block_size, q.device, first)
            scores = scores.masked_fill(~mask, -math.inf)
        top = scores.amax(-1, keepdim=True)
        weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0.0))
        total = weights.sum(-1, keepdim=True)
        out[:, rows] = ((weights @ values) / total.masked_fill(total == 0, 1.0)).transpose(1, 2)
    return out


def peer(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool,
         block_size: int) -> Tensor:
    mask = None if bias is None else bias.to(q.dtype)
    if causal:
        seen = visible(q.shape[1], k.shape[1], block_size, q.device, k.shape[1] - q.shape[1])
        hidden = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -math.inf)
        mask = hidden if mask is None else mask + hidden
    out = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale=scale,
        enable_gqa=q.shape[2] != k.shape[2])
    return out.transpose(1, 2)


def fake(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool,
         block_size: int) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


def cost(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool,
         block_size: int) -> Cost:
    seen = 0.5 if causal and q.shape[1] == k.shape[1] else 1.0
    pairs = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1] * seen
    out = q.numel() // max(q.shape[3], 1) * v.shape[3] * q.element_size()
    return Cost(flops=2.0 * pairs * (q.shape[3] + v.shape[3]), bytes=nbytes(q, k, v, bias) + out)


def cases() -> Iterator[Case]:
    def make(b: int, tq: int, tk: int, h: int, d: int, *, kv_heads: int | None = None, causal: bool = False,
             block: int = 1, bias: tuple[int, ...] | None = None, layout: str = "contiguous",
             packed: bool = False, masked: bool = False, spread: float = 1.0, apart: float = 0.0):
        def draw(r: Draw) -> tuple:
            if packed:
                q, k, v = r.normal(b, tq, 3, h, d).unbind(2)
            else:
                q = r.normal(b, tq, h, d, layout=layout, scale=spread)
                k, v = (r.normal(b, tk, kv_heads or h, d, layout=layout) for _ in range(2))
            if apart:  # every score far below what the norms of q and k allow
                q, k = q + apart, k - apart
            extra = None if bias is None else r.normal(*bias)
            if extra is not None and masked:
                extra[..., 1, :] = -math.inf
                extra[..., -1] = -math.inf
            return q, k, v, extra, d ** -0.5, causal, block
        return draw

    yield case("sd15_4096x40", "network big", make(2, 4096, 4096, 8, 40))
    yield case("sdxl_4096x64", "network big", make(2, 4096, 4096, 10, 64))
    yield case("sd15_1024x80", "network big", make(2, 1024, 1024, 8, 80))
    yield case("flux_1024x128", "network big", make(1, 1024, 1024, 24, 128))
    yield case("sd15_cross_4096x77x40", "network big", make(2, 4096, 77, 8, 40))
    yield case("sd15_256x160", "network", make(2, 256, 256, 8, 160))
    yield case("sd15_cross_256x77x160", "network", make(1, 256, 77, 8, 160))
    yield case("clip_text_77", "network", make(2, 77, 77, 12, 64, causal=True))
    yield case("vae_1x512", "network", make(1, 256, 256, 1, 512))
    yield case("vae_1024x512", "network big", make(1, 1024, 1024, 1, 512))
    yield case("packed_qkv", "view", make(2, 100, 100, 4, 40, packed=True))
    yield case("long_keys", "", make(1, 3, 3000, 2, 72))
    yield case("grouped_heads", "", make(2, 33, 45, 6, 32, kv_heads=2))
    yield case("causal_shorter_queries", "", make(1, 20, 70, 2, 64, causal=True))
    yield case("causal_longer_queries", "", make(1, 40, 24, 2, 16, causal=True))
    yield case("block_causal", "ragged", make(1, 100, 100, 3, 96, causal=True, block=16))
    yield case("bias_full", "", make(2, 40, 50, 3, 48, bias=(2, 3, 40, 50)))
    yield case("bias_keys_masked_row", "", make(2, 40, 50, 2, 48, bias=(2, 1, 40, 50), masked=True))
    yield case("bias_causal", "ragged", make(1, 37, 37, 2, 24, bias=(1, 2, 1, 37), causal=True))
    yield case("sharp", "", make(1, 70, 130, 2, 64, spread=20.0))
    for width in (8, 31, 47, 65, 72):
        yield case(f"cross_77x{width}", "ragged", make(1, 50, 77, 2, width))
    yield case("one_key", "ragged", make(2, 70, 1, 2, 24))
    yield case("keys_129", "ragged", make(1, 33, 129, 2, 40))
    yield case("far_below_the_bound", "", make(1, 70, 200, 2, 64, apart=5.0))
    yield case("far_below_in_two_stretches", "", make(1, 70, 1100, 1, 512, apart=2.0))
    yield case("ragged", "ragged", make(1, 61, 67, 3, 13))
    yield case("one_token", "ragged", make(2, 1, 1, 1, 1))
    yield case("misaligned", "view", make(2, 19, 21, 2, 40, layout="view"))
    yield case("sliced", "view", make(2, 19, 21, 2, 40, layout="slice"))
    yield case("no_batch", "empty", make(0, 8, 8, 2, 40))
    yield case("no_queries", "empty", make(1, 0, 8, 2, 40))
    yield case("no_keys", "empty", make(2, 4, 0, 2, 40))


_call = register(Op("attention", "(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, bool causal, "
                    "int block_size) -> Tensor", reference, fake, cases, cost, peer))

# The calls that kernels in CUDA C++ take; kernels/_attention_choice.py says which, and what runs the others.
LIBRARY.define("attention_cuda(Tensor q, Tensor k, Tensor v, float scale, bool causal, int block_size, int kernel) "
               "-> Tensor")


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    qs, ks, vs = q.shape, k.shape, v.shape
    if len(qs) != 4 or len(ks) != 4 or len(vs) != 4:
        raise ShapeError(f"attention: q, k, v have shapes {shape_of(q)}, {shape_of(k)}, {shape_of(v)}, "
                         "need (batch, tokens, heads, head_dim)")
    b, _, h, d = qs
    kb, _, kh, kd = ks
    if kb != b or kd != d or (ks != vs and ks[:3] != vs[:3]):
        raise ShapeError(f"attention: k {shape_of(k)} and v {shape_of(v)} do not fit q {shape_of(q)}: "
                         "batch and head_dim must agree, and v must have k's batch, tokens and heads")
    if kh == 0 or h % kh:
        raise ShapeError(f"attention: {kh} key heads do not divide {h} query heads; repeat or drop heads")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise LdmfastError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; give them one dtype")


@public
def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False,
              block_size: int = 1, bias: Tensor | None = None) -> Tensor:
    """softmax(scale * q k^T + bias) v, tiled with a running softmax (Dao et al. 2022, algorithm 1).

    q: (batch, tokens, heads, head_dim); k, v: (batch, keys, kv_heads, head_dim), kv_heads divides heads. Any
    strides whose last is 1 are read in place (slices of a packed QKV). scale: head_dim ** -0.5 if not given.
    causal: query i sees key j if j // block_size <= i // block_size; with unequal lengths the queries are the
    last ones, numbered from keys - tokens.
    bias: floating, broadcastable to (batch, heads, tokens, keys), added after scaling; -inf hides a key.
    A query that sees no key gives zeros. Output: (batch, tokens, heads, head_dim), contiguous, q's dtype.
    Raises ShapeError for sizes that do not fit, LdmfastError for mixed dtypes or block_size < 1.
    """
    _check(q, k, v)
    if block_size < 1:
        raise LdmfastError(f"attention: block_size is {block_size}, needs at least 1 (1: plain causal mask)")
    if bias is not None:
        want = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        fits = bias.ndim <= 4 and all(a in (1, w) for a, w in zip(reversed(bias.shape), reversed(want)))
        if not fits or not bias.is_floating_point():
            raise ShapeError(f"attention: bias is {bias.dtype} {shape_of(bias)}, needs a floating tensor "
                             f"that broadcasts to (batch, heads, tokens, keys) = {want}")
        while bias.ndim < 4:
            bias = bias.unsqueeze(0)
    return _call(q, k, v, bias, max(q.shape[3], 1) ** -0.5 if scale is None else scale, causal, block_size)
