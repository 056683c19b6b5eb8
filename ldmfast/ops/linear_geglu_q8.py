"""linear_geglu_q8: linear_geglu of uint8 codes and a packed int8 weight, summed exactly in 32-bit integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._faults import public
from ._op import Case, Cost, Draw, Op, case, nbytes, register
from .conv2d_q8 import check_codes, check_products, draw_codes, dtype_of
from .geglu import peer as torch_geglu
from .geglu import reference as plain_geglu
from .linear_geglu import check, plain_weight, side_by_side
from .pack_weight import peer_weight
from .pack_weight import reference as pack


def reference(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
              bias: Tensor | None, out_features: int) -> Tensor:
    dtype = dtype_of(bias, None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w = plain_weight(weight, out_features, q.shape[-1]).double()
    y = ((q.double() - zero_point) @ w.T).to(wide) * (scale.to(wide) * weight_scale.to(wide))
    return plain_geglu(y if bias is None else y + bias.to(wide)).to(dtype)


def peer(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
         bias: Tensor | None, out_features: int) -> Tensor:
    dtype = dtype_of(bias, None)
    low = torch.float32 if dtype == torch.float64 else dtype
    plain = plain_weight(weight, out_features, q.shape[-1]) * weight_scale[:, None]
    x = ((q.float() - zero_point) * scale).to(low)
    y = F.linear(x, peer_weight(weight, plain.to(low)), None if bias is None else bias.to(low))
    return torch_geglu(y).to(dtype)


def fake(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
         bias: Tensor | None, out_features: int) -> Tensor:
    return q.new_empty((*q.shape[:-1], out_features), dtype=dtype_of(bias, None))


def cost(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
         bias: Tensor | None, out_features: int) -> Cost:
    outputs = q.numel() / max(1, q.shape[-1]) * out_features
    return Cost(flops=4.0 * q.numel() * out_features + 20.0 * outputs,
                bytes=nbytes(q, weight, bias) + outputs * dtype_of(bias, None).itemsize)


def cases() -> Iterator[Case]:
    def make(*shape: int, out: int, layout: str = "contiguous", bias: bool = True):
        def draw(d: Draw):
            w = (d.normal(2 * out, shape[-1]) * 40).clamp(-127, 127).to(torch.int8)
            exponents = (d.normal(2 * out) * 2).clamp(-3, 3).round().float() - 12
            return (*draw_codes(d, *shape, layout=layout), pack(side_by_side(w)), torch.exp2(exponents),
                    w.sum(1, dtype=torch.int32), d.normal(2 * out) if bias else None, out)
        return draw

    yield case("sd15_64x64", "network big", make(2, 4096, 320, out=1280))
    yield case("sd15_32x32", "network big", make(2, 1024, 640, out=2560))
    yield case("sd15_8x8", "network", make(2, 64, 320, out=1280))
    yield case("ragged", "ragged", make(3, 7, 37, out=41))
    yield case("one_row", "ragged", make(320, out=50))
    yield case("one_output", "ragged", make(2, 33, 16, out=1))
    yield case("misaligned", "view", make(2, 9, 66, out=32, layout="view"))
    yield case("sliced", "view", make(2, 9, 66, out=32, layout="slice"))
    yield case("no_rows", "empty", make(0, 4, 64, out=32))


_call = register(Op("linear_geglu_q8", "(Tensor q, Tensor scale, Tensor zero_point, Tensor weight, Tensor "
                    "weight_scale, Tensor weight_sums, Tensor? bias, int out_features) -> Tensor", reference, fake,
                    cases, cost, peer, cpu_only=True))


@public
def linear_geglu_q8(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor,
                    weight_sums: Tensor, bias: Tensor | None = None, *, out_features: int) -> Tensor:
    """linear_geglu of (q - zero_point) scale with w weight_scale; the products are summed exactly, in integers.

    q: (..., in), uint8, with scale (1,) float32 and zero_point (1,) int32 as ``quantize`` gives them. weight: as in
    ``linear_geglu``, of int8 w (2 D, in), with weight_scale (2 D,) float32 and weight_sums, the sums of w over its
    inputs, (2 D,) int32, and bias (2 D,), floating: values before gates. out_features: D.
    Output: (..., D), contiguous, of the bias's dtype, else bfloat16. NaN everywhere if scale is NaN.
    Raises ShapeError when sizes or dtypes do not fit, or if a sum could exceed 32 bits (66,311 products).
    """
    check_codes("linear_geglu_q8", q, scale, zero_point, weight_scale, weight_sums, 2 * out_features)
    check("linear_geglu_q8", q, weight, torch.int8, bias, out_features)
    check_products("linear_geglu_q8", q.shape[-1])
    return _call(q, scale, zero_point, weight, weight_scale, weight_sums, bias, out_features)
