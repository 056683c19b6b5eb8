"""linear_geglu: rows times a packed weight whose outputs are values and gates; only value * GELU(gate) is written."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, nbytes, register, shape_of
from .geglu import peer as torch_geglu
from .geglu import reference as plain_geglu
from .pack_weight import TILE, image_weight, packed_shape, peer_weight
from .pack_weight import reference as pack


def side_by_side(weight: Tensor) -> Tensor:
    """Rows (2 D, ...) of values, then gates -> 16 values, their 16 gates, the next 16 values, and so on, D filled up
    with zeros to a multiple of 16: what ``pack_weight`` then puts into one panel."""
    half = weight.shape[0] // 2
    rows = weight.unflatten(0, (2, half)).flatten(2) if weight.ndim > 1 else weight.view(2, half, 1)
    rows = F.pad(rows, (0, 0, 0, -half % TILE)).unflatten(1, (-1, TILE)).transpose(0, 1)
    return rows.reshape(-1, *weight.shape[1:])


def plain_weight(packed: Tensor, out_features: int, channels: int) -> Tensor:
    """The weight (2 out_features, channels), values before gates, that was packed."""
    rows = image_weight(packed, packed.shape[0] * 2 * TILE, channels).flatten(1)
    return rows.view(-1, 2, TILE, channels).transpose(0, 1).reshape(2, -1, channels)[:, :out_features].flatten(0, 1)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    wide = accumulator(x)
    y = x.to(wide) @ plain_weight(weight, out_features, x.shape[-1]).to(wide).T
    return plain_geglu(y if bias is None else y + bias.to(wide)).to(x.dtype)


def peer(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    plain = peer_weight(weight, plain_weight(weight, out_features, x.shape[-1]))
    return torch_geglu(F.linear(x, plain, bias))


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Cost:
    outputs = x.numel() / max(1, x.shape[-1]) * out_features
    return Cost(flops=4.0 * x.numel() * out_features + 20.0 * outputs,
                bytes=nbytes(x, weight, bias) + outputs * x.element_size())


def cases() -> Iterator[Case]:
    def make(*shape: int, out: int, layout: str = "contiguous", bias: bool = True):
        def draw(d: Draw):
            weight = d.normal(2 * out, shape[-1], scale=shape[-1] ** -0.5)
            return d.normal(*shape, layout=layout), pack(side_by_side(weight)), d.normal(2 * out) if bias else None, out
        return draw

    yield case("sd15_64x64", "network big", make(2, 4096, 320, out=1280))
    yield case("sd15_32x32", "network big", make(2, 1024, 640, out=2560))
    yield case("sd15_16x16", "network big", make(2, 256, 1280, out=5120))
    yield case("sd15_8x8", "network", make(2, 64, 320, out=1280))
    yield case("ragged", "ragged", make(3, 7, 37, out=41))
    yield case("no_bias", "", make(2, 9, 64, out=16, bias=False))
    yield case("one_row", "ragged", make(320, out=50))
    yield case("one_output", "ragged", make(2, 33, 16, out=1))
    yield case("many_rows", "ragged", make(1, 1037, 33, out=34))
    yield case("misaligned", "view", make(2, 9, 66, out=32, layout="view"))
    yield case("sliced", "view", make(2, 9, 66, out=32, layout="slice"))
    yield case("no_rows", "empty", make(0, 4, 64, out=32))


_call = register(Op("linear_geglu", "(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor", reference,
                    fake, cases, cost, peer, cpu_only=True))


def check(op: str, x: Tensor, weight: Tensor, dtype: torch.dtype, bias: Tensor | None, out_features: int) -> None:
    if x.ndim < 1 or x.shape[-1] < 1 or out_features < 1:
        raise ShapeError(f"{op}: x has shape {shape_of(x)} for {out_features} outputs, needs (..., in) and at least "
                         "one of each")
    wanted = packed_shape((2 * (out_features + -out_features % TILE), x.shape[-1]), dtype)
    if weight.dtype != dtype or weight.shape != wanted or not weight.is_contiguous():
        raise ShapeError(f"{op}: weight is {weight.dtype} {shape_of(weight)}, needs {dtype} {wanted}, as "
                         f"ops.pack_weight makes it of {(2 * out_features, x.shape[-1])}, its rows side by side")
    if bias is not None and bias.shape != (2 * out_features,):
        raise ShapeError(f"{op}: bias has shape {shape_of(bias)}, needs ({2 * out_features},)")


@public
def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_features: int) -> Tensor:
    """GEGLU of y = x W^T + bias, y[..., :D] * gelu(y[..., D:]) (Shazeer 2020, equation 6), with fp32 sums; y itself is
    never in memory.

    x: (..., in), floating. weight: ``pack_weight(side_by_side(W))`` of W (2 D, in), x's dtype; side_by_side, in this
    module, brings 16 values beside their 16 gates. bias: (2 D,), values before gates. out_features: D.
    Output: (..., D), contiguous, x's dtype. Raises ShapeError when sizes or dtypes do not fit.
    """
    check("linear_geglu", x, weight, x.dtype, bias, out_features)
    return _call(x, weight, bias, out_features)
