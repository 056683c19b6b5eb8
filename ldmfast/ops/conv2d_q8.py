"""conv2d_q8: convolution of uint8 codes, or of numbers that become codes on the way, with a packed int8 weight, summed
exactly in 32-bit integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, case, nbytes, numel, register, shape_of
from .conv2d import check, check_residual, double_size, out_shape, out_size
from .pack_weight import image_weight, peer_weight
from .pack_weight import reference as pack
from .quantize import peer as quantize_peer
from .quantize import reference as quantized

NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def result_dtype(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> torch.dtype:
    return dtype_of(bias, residual) if x.dtype == torch.uint8 else x.dtype


def dtype_of(bias: Tensor | None, residual: Tensor | None) -> torch.dtype:
    """The output's dtype: the residual's, else the bias's, else bfloat16."""
    given = bias if residual is None else residual
    return torch.bfloat16 if given is None else given.dtype


def reference(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor,
              weight_sums: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int,
              stride: int, padding: int, upsample: bool) -> Tensor:
    q, step, zero = quantized(x, 0) if scale is None or zero_point is None else (x, scale, zero_point)
    source = (double_size(q) if upsample else q).double() - zero
    w = image_weight(weight, out_channels, q.shape[1]).double()
    y = F.conv2d(source, w, None, stride, padding)
    wide = torch.float64 if result_dtype(x, bias, residual) == torch.float64 else torch.float32
    y = y.to(wide) * (step.to(wide) * weight_scale.to(wide))[:, None, None]
    if bias is not None:
        y = y + bias.to(wide)[:, None, None]
    if residual is not None:
        y = y + residual.to(wide)
    return fake(x, scale, zero_point, weight, weight_scale, weight_sums, bias, residual, out_channels, kernel, stride,
                padding, upsample).copy_(y)


def peer(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor,
         weight_sums: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int, stride: int,
         padding: int, upsample: bool) -> Tensor:
    q, step, zero = quantize_peer(x, 0) if scale is None or zero_point is None else (x, scale, zero_point)
    result = result_dtype(x, bias, residual)
    dtype = torch.float32 if result == torch.float64 else result
    plain = image_weight(weight, out_channels, q.shape[1]) * weight_scale[:, None, None, None]
    w = peer_weight(weight, plain.to(dtype, memory_format=torch.channels_last))
    z = ((q.float() - zero) * step).to(dtype)
    z = F.interpolate(z, scale_factor=2.0, mode="nearest") if upsample else z
    y = F.conv2d(z, w, None if bias is None else bias.to(dtype), stride, padding)
    return (y if residual is None else y.add_(residual)).to(result)


def fake(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor,
         weight_sums: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int, stride: int,
         padding: int, upsample: bool) -> Tensor:
    return torch.empty(out_shape(x, out_channels, kernel, stride, padding, upsample),
                       dtype=result_dtype(x, bias, residual), device=x.device, memory_format=torch.channels_last)


def cost(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor,
         weight_sums: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int, stride: int,
         padding: int, upsample: bool) -> Cost:
    outputs = numel(out_shape(x, out_channels, kernel, stride, padding, upsample))
    return Cost(flops=2.0 * outputs * x.shape[1] * kernel * kernel,
                bytes=nbytes(x, weight, bias, residual) + outputs * result_dtype(x, bias, residual).itemsize)


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
             layout: str = "channels_last", bias: bool = True, residual: bool = True, codes: bool = True):
        def draw(d: Draw):
            y = (shape[0], out, *(out_size(s, kernel, stride, padding, upsample) for s in shape[2:]))
            x = draw_codes(d, *shape, layout=layout) if codes else (d.normal(*shape, layout=layout), None, None)
            return (*x, *draw_weight(d, out, shape[1], kernel, kernel),
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
    yield case("numbers_sd15_64x64", "network channels_last big", make(2, 320, 64, 64, out=320, codes=False))
    yield case("numbers_tokens", "network channels_last big", make(1, 1280, 2048, 1, out=320, kernel=1, padding=0,
                                                                 codes=False))
    yield case("numbers", "channels_last", make(2, 70, 7, 9, out=33, codes=False))
    yield case("numbers_pointwise", "channels_last", make(3, 37, 7, 5, out=33, kernel=1, padding=0, codes=False))
    yield case("numbers_strided", "", make(2, 19, 13, 37, out=8, stride=2, residual=False, layout="contiguous",
                                           codes=False))
    yield case("numbers_upsampled", "channels_last", make(2, 70, 7, 9, out=8, upsample=True, bias=False, codes=False))
    yield case("numbers_sliced", "view", make(1, 6, 5, 4, out=7, layout="slice", codes=False))
    yield case("numbers_no_batch", "empty", make(0, 8, 4, 4, out=5, codes=False))


_call = register(Op("conv2d_q8", "(Tensor x, Tensor? scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, "
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


@public
def conv2d_q8(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, weight: Tensor, weight_scale: Tensor,
              weight_sums: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, out_channels: int,
              kernel: int = 3, stride: int = 1, padding: int = 1, upsample: bool = False) -> Tensor:
    """conv2d of (x - zero_point) scale with w weight_scale, plus bias and residual; the products are summed exactly, in
    integers (Jacob et al. 2018, equation 7, with one weight scale for each output).

    x: (N, C, H, W), uint8, with scale (1,) float32 and zero_point (1,) int32 as ``quantize`` gives them; or floating,
    with neither: then its codes are those of ``quantize(x)``, made while they are read. weight: ``pack_weight`` of w
    (out_channels, C, kernel, kernel), int8, with weight_scale (out_channels,) float32 and weight_sums, the sums of w
    over its inputs, (out_channels,) int32. bias: (out_channels,), floating. residual: like the output, floating.
    padding, upsample and output as in ``conv2d``; the output's dtype is that of a floating x, else the residual's, else
    the bias's, else bfloat16. NaN everywhere if scale is NaN, or if a floating x is not finite.
    Raises ShapeError when sizes or dtypes do not fit, or if a sum could exceed 32 bits (66,311 products).
    """
    if scale is None or zero_point is None:
        if x.dtype not in NUMBERS or scale is not zero_point:
            raise ShapeError(f"conv2d_q8: x is {x.dtype}; codes need their scale and zero_point, numbers neither")
        check_weight_codes("conv2d_q8", weight_scale, weight_sums, out_channels)
    else:
        check_codes("conv2d_q8", x, scale, zero_point, weight_scale, weight_sums, out_channels)
    check("conv2d_q8", x, weight, torch.int8, bias, out_channels, kernel, stride, padding, upsample)
    check_residual("conv2d_q8", residual, out_shape(x, out_channels, kernel, stride, padding, upsample),
                   x.dtype if x.is_floating_point() else None)
    check_products("conv2d_q8", x.shape[1] * kernel * kernel)
    return _call(x, scale, zero_point, weight, weight_scale, weight_sums, bias, residual, out_channels, kernel, stride,
                 padding, upsample)
