"""conv2d: convolution of channels-last images with a packed weight, with bias and residual added before the only
rounding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, nbytes, numel, register, shape_of
from .pack_weight import image_weight, packed_shape, peer_weight
from .pack_weight import reference as pack


def out_size(size: int, kernel: int, stride: int, padding: int, upsample: bool) -> int:
    return ((2 * size if upsample else size) + 2 * padding - kernel) // stride + 1


def out_shape(x: Tensor, out_channels: int, kernel: int, stride: int, padding: int, upsample: bool) -> tuple[int, ...]:
    h, w = (out_size(s, kernel, stride, padding, upsample) for s in x.shape[2:])
    return x.shape[0], out_channels, h, w


def double_size(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int,
              stride: int, padding: int, upsample: bool) -> Tensor:
    wide = accumulator(x)
    source = double_size(x) if upsample else x
    y = F.conv2d(source.to(wide), image_weight(weight, out_channels, x.shape[1]).to(wide),
                 None if bias is None else bias.to(wide), stride, padding)
    y = y if residual is None else y + residual.to(wide)
    return fake(x, weight, bias, residual, out_channels, kernel, stride, padding, upsample).copy_(y)


def peer(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int,
         stride: int, padding: int, upsample: bool) -> Tensor:
    plain = peer_weight(weight, image_weight(weight, out_channels, x.shape[1]).contiguous(
        memory_format=torch.channels_last))
    y = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x, plain, bias, stride, padding)
    return y if residual is None else y.add_(residual)


def fake(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int,
         stride: int, padding: int, upsample: bool) -> Tensor:
    shape = out_shape(x, out_channels, kernel, stride, padding, upsample)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int, kernel: int,
         stride: int, padding: int, upsample: bool) -> Cost:
    outputs = numel(out_shape(x, out_channels, kernel, stride, padding, upsample))
    return Cost(flops=2.0 * outputs * x.shape[1] * kernel * kernel,
                bytes=nbytes(x, weight, bias, residual) + outputs * x.element_size())


def cases() -> Iterator[Case]:
    def make(*shape: int, out: int, kernel: int = 3, stride: int = 1, padding: int = 1, upsample: bool = False,
             layout: str = "channels_last", bias: bool = True, residual: bool = True):
        def draw(d: Draw):
            y = (shape[0], out, *(out_size(s, kernel, stride, padding, upsample) for s in shape[2:]))
            weight = d.normal(out, shape[1], kernel, kernel, scale=max(1, shape[1] * kernel * kernel) ** -0.5)
            return (d.normal(*shape, layout=layout), pack(weight), d.normal(out) if bias else None,
                    d.normal(*y, layout=layout) if residual else None, out, kernel, stride, padding, upsample)
        return draw

    yield case("sd15_64x64", "network channels_last big", make(2, 320, 64, 64, out=320))
    yield case("sd15_64x64_wide", "network channels_last big", make(2, 960, 64, 64, out=320))
    yield case("sd15_32x32", "network channels_last big", make(2, 640, 32, 32, out=640))
    yield case("sd15_16x16", "network channels_last big", make(2, 1280, 16, 16, out=1280))
    yield case("sd15_16x16_wide", "network channels_last big", make(2, 2560, 16, 16, out=1280))
    yield case("sd15_8x8", "network channels_last big", make(2, 1280, 8, 8, out=1280))
    yield case("sd15_shortcut", "network channels_last big", make(2, 960, 64, 64, out=320, kernel=1, padding=0))
    yield case("sd15_up", "network channels_last big", make(2, 640, 32, 32, out=640, upsample=True, residual=False))
    yield case("sd15_down", "network channels_last big", make(2, 320, 64, 64, out=320, stride=2, residual=False))
    yield case("vae_256x256", "network channels_last big", make(1, 256, 256, 256, out=256))
    yield case("latent", "network channels_last", make(2, 4, 32, 32, out=64, residual=False))
    yield case("to_latent", "network channels_last", make(2, 64, 32, 32, out=4, residual=False))
    yield case("nchw", "", make(2, 6, 5, 4, out=7, layout="contiguous"))
    yield case("pointwise", "channels_last", make(3, 37, 7, 5, out=33, kernel=1, padding=0))
    yield case("pointwise_padded", "channels_last", make(1, 37, 3, 5, out=33, kernel=1, padding=1))
    yield case("strided", "channels_last", make(2, 19, 13, 37, out=8, stride=2, residual=False))
    yield case("strided_unpadded", "channels_last", make(2, 19, 12, 37, out=8, stride=2, padding=0))
    yield case("upsampled", "channels_last", make(2, 35, 7, 9, out=8, upsample=True))
    yield case("wide_kernel", "channels_last", make(1, 5, 9, 40, out=3, kernel=5, padding=2))
    yield case("even_kernel", "channels_last", make(1, 5, 9, 40, out=3, kernel=2, stride=2, padding=0))
    yield case("ragged", "ragged channels_last", make(1, 33, 61, 67, out=35))
    yield case("one_pixel", "ragged channels_last", make(2, 5, 1, 1, out=3, bias=False))
    yield case("narrow", "ragged channels_last", make(1, 40, 9, 1, out=3))
    yield case("misaligned", "view", make(1, 6, 5, 4, out=7, layout="view"))
    yield case("sliced", "view", make(1, 6, 5, 4, out=7, layout="slice"))
    yield case("no_batch", "empty", make(0, 8, 4, 4, out=5))


_call = register(Op("conv2d", "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int out_channels, int kernel, "
                    "int stride, int padding, bool upsample) -> Tensor", reference, fake, cases, cost, peer,
                    cpu_only=True))


def check(op: str, x: Tensor, weight: Tensor, dtype: torch.dtype, bias: Tensor | None, out_channels: int, kernel: int,
          stride: int, padding: int, upsample: bool) -> None:
    if x.ndim != 4:
        raise ShapeError(f"{op}: x has shape {shape_of(x)}, needs (N, C, H, W)")
    if x.shape[1] < 1 or out_channels < 1:
        raise ShapeError(f"{op}: {x.shape[1]} channels in and {out_channels} out, needs at least one of each")
    if kernel < 1 or stride < 1 or padding < 0:
        raise ShapeError(f"{op}: kernel {kernel}, stride {stride}, padding {padding}: needs at least 1, 1 and 0")
    if min(x.shape[2:]) < 1 or min(out_size(s, kernel, stride, padding, upsample) for s in x.shape[2:]) < 1:
        raise ShapeError(f"{op}: an image of {x.shape[2]} x {x.shape[3]} pixels is smaller than a kernel of {kernel} "
                         f"with padding {padding}")
    wanted = packed_shape((out_channels, x.shape[1], kernel, kernel), dtype)
    if weight.dtype != dtype or weight.shape != wanted or not weight.is_contiguous():
        raise ShapeError(f"{op}: weight is {weight.dtype} {shape_of(weight)}, needs {dtype} {wanted}, as "
                         f"ops.pack_weight makes it of {(out_channels, x.shape[1], kernel, kernel)}")
    if bias is not None and bias.shape != (out_channels,):
        raise ShapeError(f"{op}: bias has shape {shape_of(bias)}, needs ({out_channels},)")


def check_residual(op: str, residual: Tensor | None, shape: tuple[int, ...],
                   dtype: torch.dtype | None = None) -> None:
    if residual is None:
        return
    if residual.shape != shape:
        raise ShapeError(f"{op}: residual has shape {shape_of(residual)}, needs the output's {shape}")
    if dtype is not None and residual.dtype != dtype:
        raise ShapeError(f"{op}: residual is {residual.dtype}, needs x's {dtype}")


@public
def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, out_channels: int,
           kernel: int = 3, stride: int = 1, padding: int = 1, upsample: bool = False) -> Tensor:
    """Convolution of x, or of x doubled in size by nearest neighbours, plus bias and residual, with fp32 sums.

    x: (N, C, H, W), floating. weight: ``pack_weight`` of (out_channels, C, kernel, kernel), x's dtype. bias:
    (out_channels,). residual: like the output, x's dtype. padding: pixels of zeros on every side.
    Output: (N, out_channels, H', W') in channels-last memory, x's dtype, with H' = (H + 2 padding - kernel) / stride
    + 1, rounded down, 2 H for H with ``upsample``. A picture's result does not depend on the batch or the threads.
    Raises ShapeError when sizes or dtypes do not fit.
    """
    check("conv2d", x, weight, x.dtype, bias, out_channels, kernel, stride, padding, upsample)
    check_residual("conv2d", residual, out_shape(x, out_channels, kernel, stride, padding, upsample), x.dtype)
    return _call(x, weight, bias, residual, out_channels, kernel, stride, padding, upsample)
