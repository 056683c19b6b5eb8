"""linear_gelu_tanh_q8: linear_gelu_tanh of uint8 codes and a packed int8 weight, summed exactly in 32-bit integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._faults import public
from ._op import Case, Cost, Draw, Op, case, nbytes, register
from .conv2d_q8 import check_codes, check_products, draw_codes, draw_weight, dtype_of
from .linear_gelu_tanh import check, gelu_tanh, linear_weight
from .pack_weight import peer_weight


def reference(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
              bias: Tensor | None, out_features: int) -> Tensor:
    dtype = dtype_of(bias, None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w = linear_weight(weight, out_features, q.shape[-1]).double()
    y = ((q.double() - zero_point) @ w.T).to(wide) * (scale.to(wide) * weight_scale.to(wide))
    return gelu_tanh(y if bias is None else y + bias.to(wide)).to(dtype)


def peer(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
         bias: Tensor | None, out_features: int) -> Tensor:
    dtype = dtype_of(bias, None)
    low = torch.float32 if dtype == torch.float64 else dtype
    plain = linear_weight(weight, out_features, q.shape[-1]) * weight_scale[:, None]
    x = ((q.float() - zero_point) * scale).to(low)
    y = F.linear(x, peer_weight(weight, plain.to(low)), None if bias is None else bias.to(low))
    return gelu_tanh(y).to(dtype)


def fake(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
         bias: Tensor | None, out_features: int) -> Tensor:
    return q.new_empty((*q.shape[:-1], out_features), dtype=dtype_of(bias, None))


def cost(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
         bias: Tensor | None, out_features: int) -> Cost:
    outputs = q.numel() / max(1, q.shape[-1]) * out_features
    return Cost(flops=2.0 * q.numel() * out_features + 20.0 * outputs,
                bytes=nbytes(q, weight, bias) + outputs * dtype_of(bias, None).itemsize)


def cases() -> Iterator[Case]:
    def make(*shape: int, out: int, layout: str = "contiguous", bias: bool = True):
        def draw(d: Draw):
            weight, scale, sums = draw_weight(d, out, shape[-1])
            return (*draw_codes(d, *shape, layout=layout), weight, scale, sums, d.normal(out) if bias else None, out)
        return draw

    yield case("dit_xl_32x32", "network big", make(2, 256, 1152, out=4608))
    yield case("flux_1024", "network big", make(1, 1024, 3072, out=12288))
    yield case("dit_s_8x8", "network", make(2, 16, 384, out=1536))
    yield case("ragged", "ragged", make(3, 7, 37, out=41))
    yield case("no_bias", "", make(2, 9, 64, out=16, bias=False))
    yield case("one_row", "ragged", make(320, out=50))
    yield case("one_output", "ragged", make(2, 33, 16, out=1))
    yield case("misaligned", "view", make(2, 9, 66, out=32, layout="view"))
    yield case("sliced", "view", make(2, 9, 66, out=32, layout="slice"))
    yield case("no_rows", "empty", make(0, 4, 64, out=32))


_call = register(Op("linear_gelu_tanh_q8", "(Tensor q, Tensor scale, Tensor zero_point, Tensor weight, Tensor "
                    "weight_scale, Tensor weight_sums, Tensor? bias, int out_features) -> Tensor", reference, fake,
                    cases, cost, peer, cpu_only=True))


@public
def linear_gelu_tanh_q8(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor,
                        weight_sums: Tensor, bias: Tensor | None = None, *, out_features: int) -> Tensor:
    """linear_gelu_tanh of (q - zero_point) scale with w weight_scale; the products are summed exactly, in integers.

    q: (..., in), uint8, with scale (1,) float32 and zero_point (1,) int32 as ``quantize`` gives them. weight:
    ``pack_weight`` of int8 w (out_features, in), with weight_scale (out_features,) float32 and weight_sums, the sums of
    w over its inputs, (out_features,) int32. bias: (out_features,), floating.
    Output: (..., out_features), contiguous, of the bias's dtype, else bfloat16. NaN everywhere if scale is NaN.
    Raises ShapeError when sizes or dtypes do not fit, or if a sum could exceed 32 bits (66,311 products).
    """
    check_codes("linear_gelu_tanh_q8", q, scale, zero_point, weight_scale, weight_sums, out_features)
    check("linear_gelu_tanh_q8", q, weight, torch.int8, bias, out_features)
    check_products("linear_gelu_tanh_q8", q.shape[-1])
    return _call(q, scale, zero_point, weight, weight_scale, weight_sums, bias, out_features)
