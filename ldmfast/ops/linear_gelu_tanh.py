"""linear_gelu_tanh: rows times a packed weight, plus bias, through GELU's tanh form before the only rounding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, nbytes, register, shape_of
from .pack_weight import image_weight, packed_shape, peer_weight
from .pack_weight import reference as pack


def linear_weight(packed: Tensor, out_features: int, channels: int) -> Tensor:
    """The weight (out_features, channels) that was packed."""
    return image_weight(packed, out_features, channels).flatten(1)


def gelu_tanh(y: Tensor) -> Tensor:
    return F.gelu(y, approximate="tanh")


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    wide = accumulator(x)
    y = x.to(wide) @ linear_weight(weight, out_features, x.shape[-1]).to(wide).T
    return gelu_tanh(y if bias is None else y + bias.to(wide)).to(x.dtype)


def peer(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    plain = peer_weight(weight, linear_weight(weight, out_features, x.shape[-1]).contiguous())
    return gelu_tanh(F.linear(x, plain, bias))


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Cost:
    outputs = x.numel() / max(1, x.shape[-1]) * out_features
    return Cost(flops=2.0 * x.numel() * out_features + 20.0 * outputs,
                bytes=nbytes(x, weight, bias) + outputs * x.element_size())


def cases() -> Iterator[Case]:
    def make(*shape: int, out: int, layout: str = "contiguous", bias: bool = True):
        def draw(d: Draw):
            weight = d.normal(out, shape[-1], scale=shape[-1] ** -0.5)
            return d.normal(*shape, layout=layout), pack(weight), d.normal(out) if bias else None, out
        return draw

    yield case("dit_xl_32x32", "network big", make(2, 256, 1152, out=4608))
    yield case("pixart_64x64", "network big", make(2, 1024, 1152, out=4608))
    yield case("flux_1024", "network big", make(1, 1024, 3072, out=12288))
    yield case("dit_s_8x8", "network", make(2, 16, 384, out=1536))
    yield case("ragged", "ragged", make(3, 7, 37, out=41))
    yield case("no_bias", "", make(2, 9, 64, out=16, bias=False))
    yield case("one_row", "ragged", make(320, out=50))
    yield case("one_output", "ragged", make(2, 33, 16, out=1))
    yield case("misaligned", "view", make(2, 9, 66, out=32, layout="view"))
    yield case("sliced", "view", make(2, 9, 66, out=32, layout="slice"))
    yield case("no_rows", "empty", make(0, 4, 64, out=32))


_call = register(Op("linear_gelu_tanh", "(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor",
                    reference, fake, cases, cost, peer, cpu_only=True))


def check(op: str, x: Tensor, weight: Tensor, dtype: torch.dtype, bias: Tensor | None, out_features: int) -> None:
    if x.ndim < 1 or x.shape[-1] < 1 or out_features < 1:
        raise ShapeError(f"{op}: x has shape {shape_of(x)} for {out_features} outputs, needs (..., in) and at least "
                         "one of each")
    wanted = packed_shape((out_features, x.shape[-1]), dtype)
    if weight.dtype != dtype or weight.shape != wanted or not weight.is_contiguous():
        raise ShapeError(f"{op}: weight is {weight.dtype} {shape_of(weight)}, needs {dtype} {wanted}, as "
                         f"ops.pack_weight makes it of {(out_features, x.shape[-1])}")
    if bias is not None and bias.shape != (out_features,):
        raise ShapeError(f"{op}: bias has shape {shape_of(bias)}, needs ({out_features},)")


@public
def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_features: int) -> Tensor:
    """gelu(x W^T + bias) with GELU's tanh form (Hendrycks and Gimpel 2016, section 2) and fp32 sums: the first layer of
    a diffusion transformer's MLP.

    x: (..., in), floating. weight: ``pack_weight`` of W (out_features, in), x's dtype. bias: (out_features,).
    Output: (..., out_features), contiguous, x's dtype. A row's result does not depend on the other rows or the threads.
    Raises ShapeError when sizes or dtypes do not fit.
    """
    check("linear_gelu_tanh", x, weight, x.dtype, bias, out_features)
    return _call(x, weight, bias, out_features)
