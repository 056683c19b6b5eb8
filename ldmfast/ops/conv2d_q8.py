"""conv2d_q8: convolution of uint8 codes with a packed int8 weight, summed exactly in 32-bit integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ShapeError
from ._op import Case, Cost, Draw, Op, case, nbytes, numel, register, shape_of
from .conv2d import check, check_residual, double_size, out_shape, out_size
from .pack_weight import image_weight, peer_weight
from .pack_weight import reference as pack


def dtype_of(bias: Tensor | None, residual: Tensor | None) -> torch.dtype:
    """The output's dtype: the residual's, else the bias's, else bfloat16."""
    given = bias if residual is None else residual
    return torch.bfloat16 if given is None else given.dtype


def reference(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
              bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int, stride: int, padding: int,
              upsample: bool) -> Tensor:
    source = (double_size(q) if upsample else q).double() - zero_point
    w = image_weight(weight, out_channels, q.shape[1]).double()
    y = F.conv2d(source, w, None, stride, padding)
    wide = torch.float64 if dtype_of(bias, residual) == torch.float64 else torch.float32
    y = y.to(wide) * (scale.to(wide) * weight_scale.to(wide))[:, None, None]
    if bias is not None:
        y = y + bias.to(wide)[:, None, None]
    if residual is not None:
        y = y + residual.to(wide)
    return fake(q, scale, zero_point, weight, weight_scale, weight_sums, bias, residual, out_channels, kernel, stride,
                padding, upsample).copy_(y)


def peer(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
         bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int, stride: int, padding: int,
         upsample: bool) -> Tensor:
    dtype = dtype_of(bias, residual)
    dtype = torch.float32 if dtype == torch.float64 else dtype
    plain = image_weight(weight, out_channels, q.shape[1]) * weight_scale[:, None, None, None]
    w = peer_weight(weight, plain.to(dtype, memory_format=torch.channels_last))
    x = ((q.float() - zero_point) * scale).to(dtype)
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    y = F.conv2d(x, w, None if bias is None else bias.to(dtype), stride, padding)
    return (y if residual is None else y.add_(residual)).to(dtype_of(bias, residual))


def fake(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
         bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int, stride: int, padding: int,
         upsample: bool) -> Tensor:
    return torch.empty(out_shape(q, out_channels, kernel, stride, padding, upsample), dtype=dtype_of(bias, residual),
                       device=q.device, memory_format=torch.channels_last)


def cost(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
         bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int, stride: int, padding: int,
         upsample: bool) -> Cost:
    outputs = numel(out_shape(q, out_channels, kernel, stride, padding, upsample))
    return Cost(flops=2.0 * outputs * q.shape[1] * kernel * kernel,
                bytes=nbytes(q, weight, bias, residual) + outputs * dtype_of(bias, residual).itemsize)


def draw_codes(d: Draw, *shape: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point."""
    q = (d.normal(*shape, layout=layout) * 40 + 120).clamp(0, 255).to(torch.uint8)
    return q, torch.tensor([2.0**-6]), torch.tensor([117], dtype=torch.int32)


def draw_weight(d: Draw, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed int8 weight, its scales and its sums."""
    w = (d.normal(*shape) * 40).clamp(-127, 127).to(torch.int8)
    exponents = (d.normal(shape[0]) * 2).clamp(-3, 3).round().float() - 12
    return pack(w), torch.exp2(exponents), w.flatten(1).sum(1, dtype=torch.int32)


def cases() -> Iterator[Case]:
    def make(*shape: int, out: int, kernel: int = 3, stride: int = 1, padding: int = 1, upsample: bool = False,
             layout: str = "channels_last", bias: bool = True, residual: bool = True):
        def draw(d: Draw):
            y = (shape[0], out, *(out_size(s, kernel, stride, padding, upsample) for s in shape[2:]))
            return (*draw_codes(d, *shape, layout=layout), *draw_weight(d, out, shape[1], kernel, kernel),
                    d.normal(out) if bias else None, d.normal(*y, layout=layout) if residual else None, out, kernel,
                    stride, padding, upsample)
        return draw

    yield case("sd15_64x64", "network channels_last big", make(2, 320, 64, 64, out=320))
    yield case("sd15_32x32", "network channels_last big", make(2, 640, 32, 32, out=640))
    yield case("sd15_16x16", "network channels_last big", make(2, 1280, 16, 16, out=1280))
    yield case("sd15_8x8", "network channels_last big", make(2, 1280, 8, 8, out=1280))
    yield case("small", "network channels_last", make(2, 64, 16, 16, out=64))
    yield case("no_bias", "channels_last", make(1, 64, 5, 6, out=32, bias=False, residual=False))
    yield case("nchw", "", make(2, 6, 5, 4, out=7, layout="contiguous"))
    yield case("pointwise", "channels_last", make(3, 37, 7, 5, out=33, kernel=1, padding=0))
    yield case("strided", "channels_last", make(2, 19, 13, 37, out=8, stride=2, residual=False))
    yield case("upsampled", "channels_last", make(2, 70, 7, 9, out=8, upsample=True))
    yield case("ragged", "ragged channels_last", make(1, 33, 31, 37, out=35))
    yield case("one_pixel", "ragged channels_last", make(2, 5, 1, 1, out=3))
    yield case("misaligned", "view", make(1, 6, 5, 4, out=7, layout="view"))
    yield case("sliced", "view", make(1, 6, 5, 4, out=7, layout="slice"))
    yield case("no_batch", "empty", make(0, 8, 4, 4, out=5))


_call = register(Op("conv2d_q8", "(Tensor q, Tensor scale, Tensor zero_point, Tensor weight, Tensor weight_scale, "
                    "Tensor weight_sums, Tensor? bias, Tensor? residual, int out_channels, int kernel, int stride, "
                    "int padding, bool upsample) -> Tensor", reference, fake, cases, cost, peer, cpu_only=True))


def check_codes(op: str, q: Tensor, scale: Tensor, zero_point: Tensor, weight_scale: Tensor, weight_sums: Tensor,
                outputs: int) -> None:
    if q.dtype != torch.uint8:
        raise ShapeError(f"{op}: q is {q.dtype}, needs the torch.uint8 codes of ops.quantize")
    _check_vector(op, "scale", scale, torch.float32, 1)
    _check_vector(op, "zero_point", zero_point, torch.int32, 1)
    check_weight_codes(op, weight_scale, weight_sums, outputs)


def check_weight_codes(op: str, weight_scale: Tensor, weight_sums: Tensor, outputs: int) -> None:
    _check_vector(op, "weight_scale", weight_scale, torch.float32, outputs)
    _check_vector(op, "weight_sums", weight_sums, torch.int32, outputs)


def _check_vector(op: str, name: str, x: Tensor, dtype: torch.dtype, size: int) -> None:
    if x.dtype != dtype or x.shape != (size,) or not x.is_contiguous():
        raise ShapeError(f"{op}: {name} is {x.dtype} {shape_of(x)}, needs {dtype} ({size},)")


def check_products(op: str, products: int) -> None:
    if products * 255 * 127 >= 2**31:
        raise ShapeError(f"{op}: a sum of {products} products does not fit 32 bits; at most {2**31 // (255 * 127)} do")


def conv2d_q8(q: Tensor, scale: Tensor, zero_point: Tensor, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor,
              bias: Tensor | None = None, residual: Tensor | None = None, *, out_channels: int, kernel: int = 3,
              stride: int = 1, padding: int = 1, upsample: bool = False) -> Tensor:
    """conv2d of (q - zero_point) scale with w weight_scale, plus bias and residual; the products are summed exactly, in
    integers (Jacob et al. 2018, equation 7, with one weight scale for each output).

    q: (N, C, H, W), uint8, with scale (1,) float32 and zero_point (1,) int32 as ``quantize`` gives them. weight:
    ``pack_weight`` of w (out_channels, C, kernel, kernel), int8, with weight_scale (out_channels,) float32 and
    weight_sums, the sums of w over its inputs, (out_channels,) int32. bias: (out_channels,), floating. residual: like
    the output, floating. padding, upsample and output as in ``conv2d``; the output's dtype is the residual's, else the
    bias's, else bfloat16. NaN everywhere if scale is NaN.
    Raises ShapeError when sizes or dtypes do not fit, or if a sum could exceed 32 bits (66,311 products).
    """
    check_codes("conv2d_q8", q, scale, zero_point, weight_scale, weight_sums, out_channels)
    check("conv2d_q8", q, weight, torch.int8, bias, out_channels, kernel, stride, padding, upsample)
    check_residual("conv2d_q8", residual, out_shape(q, out_channels, kernel, stride, padding, upsample))
    check_products("conv2d_q8", q.shape[1] * kernel * kernel)
    return _call(q, scale, zero_point, weight, weight_scale, weight_sums, bias, residual, out_channels, kernel, stride,
                 padding, upsample)
