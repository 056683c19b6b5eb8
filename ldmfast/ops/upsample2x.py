"""upsample2x: every pixel becomes a 2x2 block (nearest neighbour), layout kept."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Op, case, memory_format, nbytes, register, shape_of


def reference(x: Tensor) -> Tensor:
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return doubled.contiguous(memory_format=memory_format(x))


def peer(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2.0, mode="nearest") if x.numel() else fake(x)


def fake(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty((n, c, 2 * h, 2 * w)).contiguous(memory_format=memory_format(x))


def cost(x: Tensor) -> Cost:
    return Cost(flops=0.0, bytes=5 * nbytes(x))


def cases() -> Iterator[Case]:
    def make(*shape: int, layout: str = "contiguous"):
        return lambda d: (d.normal(*shape, layout=layout),)

    cl = "channels_last"
    yield case("sd15_32x32", "network channels_last", make(2, 640, 32, 32, layout=cl))
    yield case("vae_256x256", "network channels_last big", make(1, 256, 256, 256, layout=cl))
    yield case("sd15_16x16_nchw", "network", make(2, 1280, 16, 16))
    yield case("small", "channels_last", make(2, 8, 4, 4, layout=cl))
    yield case("ragged", "ragged channels_last", make(3, 5, 7, 11, layout=cl))
    yield case("ragged_nchw", "ragged", make(1, 3, 1, 13))
    yield case("one_pixel", "ragged", make(2, 4, 1, 1))
    yield case("misaligned", "view", make(2, 3, 5, 7, layout="view"))
    yield case("sliced", "view", make(2, 3, 5, 7, layout="slice"))
    yield case("no_batch", "empty", make(0, 8, 4, 4, layout=cl))
    yield case("no_pixels", "empty", make(2, 8, 0, 4))


_call = register(Op("upsample2x", "(Tensor x) -> Tensor", reference, fake, cases, cost, peer))


@public
def upsample2x(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by two: out[n, c, i, j] = x[n, c, i // 2, j // 2].

    x: (N, C, H, W), floating. Output: (N, C, 2 H, 2 W), x's dtype and layout.
    Raises ShapeError for another rank.
    """
    if x.ndim != 4:
        raise ShapeError(f"upsample2x: x has shape {shape_of(x)}, needs (N, C, H, W)")
    return _call(x)
