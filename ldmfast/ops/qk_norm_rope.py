"""qk_norm_rope: RMS norm and rotary embedding of packed queries and keys, text and image tokens joined on the way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from ..errors import LdmfastError, ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, nbytes, register, shape_of


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: (B, T, ..., D), cos and sin: (T, D / 2) or (B or 1, T, D / 2)."""
    table = (*cos.shape[:-1], *[1] * (x.ndim - 3), cos.shape[-1])
    cos, sin = cos.reshape(table), sin.reshape(table)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    halves = a * cos - b * sin, b * cos + a * sin
    return torch.stack(halves, -1).flatten(-2) if interleaved else torch.cat(halves, -1)


def reference(qkv: Tensor, context: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
              context_q_weight: Tensor | None, context_k_weight: Tensor | None, cos: Tensor | None,
              sin: Tensor | None, interleaved: bool, eps: float | None) -> Tensor:
    dtype = accumulator(qkv)

    def part(x: Tensor, weight: Tensor | None) -> Tensor:
        y = x.to(dtype)
        if eps is not None:
            y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
        return y if weight is None else y * weight.to(dtype)

    out = fake(qkv, context, None, None, None, None, None, None, interleaved, eps)
    if context is not None:
        out[:, :, 2] = torch.cat([context[:, :, 2], qkv[:, :, 2]], 1)
    for i, (own, of_text) in enumerate(((q_weight, context_q_weight), (k_weight, context_k_weight))):
        y = part(qkv[:, :, i], own)
        if context is not None:
            y = torch.cat([part(context[:, :, i], of_text), y], 1)
        out[:, :, i] = y if cos is None or sin is None else _rotated(y, cos.to(dtype), sin.to(dtype), interleaved)
    return out


def peer(qkv: Tensor, context: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
         context_q_weight: Tensor | None, context_k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
         interleaved: bool, eps: float | None) -> Tensor:
    out = fake(qkv, context, None, None, None, None, None, None, interleaved, eps)
    if context is not None:
        torch.cat([context[:, :, 2], qkv[:, :, 2]], 1, out=out[:, :, 2])
    for i, (own, of_text) in enumerate(((q_weight, context_q_weight), (k_weight, context_k_weight))):
        y = qkv[:, :, i] if eps is None else rms_norm(qkv[:, :, i], qkv.shape[-1:], own, eps)
        if context is not None:
            z = context[:, :, i] if eps is None else rms_norm(context[:, :, i], qkv.shape[-1:], of_text, eps)
            y = torch.cat([z, y], 1)
        out[:, :, i] = y if cos is None or sin is None else _rotated(y.to(cos.dtype), cos, sin, interleaved)
    return out


def fake(qkv: Tensor, context: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
         context_q_weight: Tensor | None, context_k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
         interleaved: bool, eps: float | None) -> Tensor:
    b, tokens, _, heads, depth = qkv.shape
    if context is None:
        return qkv.new_empty((b, tokens, 2, heads, depth))
    return qkv.new_empty((b, context.shape[1] + tokens, 3, heads, depth))


def cost(qkv: Tensor, context: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
         context_q_weight: Tensor | None, context_k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
         interleaved: bool, eps: float | None) -> Cost:
    moved = nbytes(qkv) * 2 / 3 if context is None else nbytes(qkv, context)
    work = (0 if eps is None else 4) + (0 if cos is None else 3)
    return Cost(flops=work * moved / qkv.element_size(), bytes=2 * moved + nbytes(cos, sin))


def cases() -> Iterator[Case]:
    def make(b: int, tokens: int, text: int, heads: int, depth: int, *, rope: bool = True, interleaved: bool = True,
             eps: float | None = 1e-6, weights: bool = True, layout: str = "contiguous", tables: int = 0,
             tail: int = 0):
        def draw(d: Draw) -> tuple:
            def packed(t: int) -> Tensor:
                if tail:  # of a wider projection
                    wide = d.normal(b, t, 3 * heads * depth + tail)
                    return wide[..., : 3 * heads * depth].unflatten(-1, (3, heads, depth))
                return d.normal(b, t, 3, heads, depth, layout=layout)

            x, context = packed(tokens), packed(text) if text else None
            w = [d.normal(depth, offset=1.0, scale=0.2) if weights and eps is not None else None for _ in range(4)]
            table = (*([tables] if tables else []), tokens + text, depth // 2)
            wide = torch.float64 if d.dtype == torch.float64 else torch.float32
            angle = d.normal(*table, scale=3.0, dtype=torch.float64)
            cos, sin = (f(angle).to(wide) if rope else None for f in (torch.cos, torch.sin))
            return x, context, w[0], w[1], *(w[2:] if text else (None, None)), cos, sin, interleaved, eps
        return draw

    yield case("flux_double_1024_512", "network big", make(1, 1024, 512, 24, 128))
    yield case("flux_single_1536", "network big", make(1, 1536, 0, 24, 128))
    yield case("sd35_4096_333", "network big", make(2, 4096, 333, 24, 64, rope=False))
    yield case("flux_64_32", "network", make(1, 64, 32, 24, 128))
    yield case("sd3_join_16_77", "network", make(1, 16, 77, 24, 64, rope=False, eps=None))
    yield case("halves", "", make(2, 9, 4, 3, 64, interleaved=False))
    yield case("pairs_40", "", make(2, 9, 0, 3, 40))
    yield case("halves_72_no_text", "", make(1, 6, 0, 2, 72, interleaved=False))
    yield case("rope_only", "", make(2, 7, 3, 2, 64, eps=None))
    yield case("norm_only", "", make(2, 7, 0, 2, 64, rope=False))
    yield case("no_weights", "", make(2, 7, 3, 2, 16, weights=False))
    yield case("nothing", "", make(2, 5, 0, 2, 16, rope=False, eps=None))
    yield case("tables_of_each_element", "", make(3, 5, 2, 2, 32, tables=3))
    yield case("one_table_in_three_dims", "", make(2, 5, 2, 2, 32, tables=1))
    yield case("ragged", "ragged", make(3, 5, 3, 5, 22))
    yield case("ragged_halves", "ragged", make(1, 3, 1, 7, 50, interleaved=False))
    yield case("depth_2", "ragged", make(2, 3, 1, 1, 2))
    yield case("misaligned", "view", make(2, 5, 3, 2, 32, layout="view"))
    yield case("sliced", "view", make(2, 5, 3, 2, 32, layout="slice", interleaved=False))
    yield case("part_of_a_projection", "view", make(2, 5, 0, 2, 64, tail=24))
    yield case("no_batch", "empty", make(0, 5, 3, 2, 32))
    yield case("no_tokens", "empty", make(2, 0, 0, 2, 32))


_call = register(Op("qk_norm_rope", "(Tensor qkv, Tensor? context, Tensor? q_weight, Tensor? k_weight, "
                    "Tensor? context_q_weight, Tensor? context_k_weight, Tensor? cos, Tensor? sin, bool interleaved, "
                    "float? eps) -> Tensor", reference, fake, cases, cost, peer))


def _check(qkv: Tensor, context: Tensor | None) -> None:
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] % 2:
        raise ShapeError(f"qk_norm_rope: qkv has shape {shape_of(qkv)}, needs (batch, tokens, 3, heads, head_dim) "
                         "with an even head_dim")
    if context is None:
        return
    if context.ndim != 5 or context.shape[:1] + context.shape[2:] != qkv.shape[:1] + qkv.shape[2:]:
        raise ShapeError(f"qk_norm_rope: context has shape {shape_of(context)}, may differ from qkv's "
                         f"{shape_of(qkv)} in its tokens only")
    if context.dtype != qkv.dtype:
        raise LdmfastError(f"qk_norm_rope: qkv is {qkv.dtype} and context {context.dtype}; give them one dtype")


def _table(name: str, table: Tensor, qkv: Tensor, tokens: int) -> Tensor:
    want = (tokens, qkv.shape[4] // 2)
    if table.shape[-2:] != want or table.shape[:-2] not in ((), (1,), qkv.shape[:1]):
        raise ShapeError(f"qk_norm_rope: {name} has shape {shape_of(table)}, needs {want} or "
                         f"{(qkv.shape[0], *want)}: one angle for each token and pair of channels")
    dtype = accumulator(qkv)
    return table if table.dtype == dtype and table.is_contiguous() else table.to(dtype).contiguous()


@public
def qk_norm_rope(qkv: Tensor, context: Tensor | None = None, *, q_weight: Tensor | None = None,
                 k_weight: Tensor | None = None, context_q_weight: Tensor | None = None,
                 context_k_weight: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
                 interleaved: bool = True, eps: float | None = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for attention: RMS norm over each head (Zhang and Sennrich 2019), then rotary position
    embedding (Su et al. 2021, equation 34), of one packed projection or of two that attend jointly.

    qkv: (batch, tokens, 3, heads, head_dim), read in place whatever its strides, the last of which is 1: a view of a
    projection's output. context: the same of the text's tokens; they come first in the result, which holds both, so
    that nothing is concatenated.
    eps: of the norm, None for no norm. q_weight, k_weight: (head_dim,), 1 if not given; context_q_weight and
    context_k_weight are those of the text's tokens.
    cos, sin: (all tokens, head_dim / 2) or (batch, all tokens, head_dim / 2), text first; no rotation if not given.
    Read in fp32 (fp64 for fp64), converted if they are not. Pair i of a head is channels (2 i, 2 i + 1) if
    interleaved, else (i, i + head_dim / 2), and becomes (a cos - b sin, b cos + a sin).
    Returns q, k, v: (batch, all tokens, heads, head_dim), views of one new tensor; without context v is qkv's own.
    Raises ShapeError when sizes do not fit, LdmfastError for mixed dtypes, half a table, or weights without a norm.
    """
    _check(qkv, context)
    weights = {"q_weight": q_weight, "k_weight": k_weight, "context_q_weight": context_q_weight,
               "context_k_weight": context_k_weight}
    for name, weight in weights.items():
        if weight is None:
            continue
        if eps is None or (context is None and name.startswith("context")):
            raise LdmfastError(f"qk_norm_rope: {name} is given, but there is no "
                               f"{'norm (eps is None)' if eps is None else 'context'}; leave it out")
        if weight.shape != qkv.shape[4:]:
            raise ShapeError(f"qk_norm_rope: {name} has shape {shape_of(weight)}, needs ({qkv.shape[4]},)")
    if (cos is None) != (sin is None):
        raise LdmfastError("qk_norm_rope: one of cos and sin is given without the other; give both or neither")
    if cos is not None and sin is not None:
        tokens = qkv.shape[1] + (0 if context is None else context.shape[1])
        cos, sin = _table("cos", cos, qkv, tokens), _table("sin", sin, qkv, tokens)
        if cos.shape != sin.shape:
            raise ShapeError(f"qk_norm_rope: cos has shape {shape_of(cos)} and sin {shape_of(sin)}; they must be equal")
    out = _call(qkv, context, *weights.values(), cos, sin, interleaved, eps)
    return out[:, :, 0], out[:, :, 1], (qkv if context is None else out)[:, :, 2]
