"""quantize: uint8 codes of a tensor, with a border for the convolution that reads them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ._faults import public
from ._op import Case, Cost, Op, accumulator, case, nbytes, register
from ._q8 import RESULT, Codes, check_pad, code_format, empty_image_codes, encode, ends, torch_encode, with_pad


def reference(x: Tensor, pad: int) -> Codes:
    y = x.to(accumulator(x))
    return encode(y, *ends(y), pad, code_format(x))


def peer(x: Tensor, pad: int) -> Codes:
    return torch_encode(x, pad)


def fake(x: Tensor, pad: int) -> Codes:
    return empty_image_codes(x, pad)


def cost(x: Tensor, pad: int) -> Cost:
    return Cost(flops=4.0 * x.numel(), bytes=nbytes(x) + x.numel())


def _plain() -> Iterator[Case]:
    def make(*shape: int, layout: str = "contiguous", scale: float = 1.0, offset: float = 0.0):
        return lambda d: (d.normal(*shape, layout=layout, scale=scale, offset=offset),)

    cl = "channels_last"
    yield case("sd15_64x64", "network channels_last big", make(2, 320, 64, 64, layout=cl))
    yield case("sd15_16x16", "network channels_last", make(2, 1280, 16, 16, layout=cl))
    yield case("tokens", "network", make(2, 1024, 640))
    yield case("nchw", "", make(2, 6, 5, 4))
    yield case("all_positive", "channels_last", make(2, 6, 5, 4, layout=cl, offset=9.0))
    yield case("all_negative", "", make(3, 40, offset=-9.0))
    yield case("tiny_numbers", "", make(3, 40, scale=1e-37))
    yield case("zeros", "channels_last", make(2, 4, 3, 3, layout=cl, scale=0.0))
    yield case("ragged", "ragged channels_last", make(3, 5, 7, 11, layout=cl))
    yield case("one_pixel", "ragged", make(1, 1, 1, 1))
    yield case("one_number", "ragged", make(1))
    yield case("volume", "channels_last", make(1, 6, 3, 5, 4, layout=cl))
    yield case("misaligned", "view", make(2, 3, 5, 7, layout="view"))
    yield case("sliced", "view", make(2, 3, 5, 7, layout="slice"))
    yield case("no_batch", "empty", make(0, 8, 4, 4, layout=cl))
    yield case("no_pixels", "empty", make(2, 8, 0, 4))
    yield case("lines_without_pixels", "empty", make(2, 8, 4, 0, layout=cl))
    yield case("no_channels", "empty", make(2, 0, 3, 3))


def cases() -> Iterator[Case]:
    return with_pad(_plain)


_call = register(Op("quantize", "(Tensor x, int pad)" + RESULT, reference, fake, cases, cost, peer, cpu_only=True))


@public
def quantize(x: Tensor, *, pad: int = 0) -> Codes:
    """uint8 codes of x with one scale for the whole tensor: x is about (q - zero_point) * scale.

    x: any shape, floating. Returns q (uint8, x's shape), scale (float32, shape (1,)) and zero_point (int32, shape
    (1,)). An image (N, C, H, W) gives q in channels-last order, with ``pad`` pixels of zero_point around it: a
    convolution without padding, that corrects for the zero point with a constant, then equals one padded with zeros.

    With lo = min(0, min x) and hi = max(0, max x): scale = (hi - lo) / 255, zero_point = round(-lo / scale) and
    q = clamp(round(x / scale) + zero_point, 0, 255) (Jacob et al. 2018, equation 1). scale is 1 for a tensor of zeros
    or an empty one. If any element is not finite, scale is NaN and zero_point and q are 0.
    Raises ShapeError for a border around something that is no image.
    """
    check_pad("quantize", x, pad)
    return _call(x, pad)
