"""norm_conv2d: group_norm_silu and the convolution of its result, which is never in memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ._faults import public
from ._op import Case, Cost, Draw, Op, case, register
from .conv2d import check, check_residual, out_shape, out_size
from .conv2d import cost as conv_cost
from .conv2d import fake as conv_fake
from .conv2d import peer as conv_peer
from .conv2d import reference as conv_reference
from .group_norm_silu import check as check_norm
from .group_norm_silu import cost as norm_cost
from .group_norm_silu import peer as norm_peer
from .group_norm_silu import reference as norm_reference
from .pack_weight import reference as pack


def reference(x: Tensor, shift: Tensor | None, num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None,
              eps: float, silu: bool, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int,
              kernel: int, stride: int, padding: int) -> Tensor:
    y = norm_reference(x, shift, num_groups, norm_weight, norm_bias, eps, silu)
    return conv_reference(y, weight, bias, residual, out_channels, kernel, stride, padding, False)


def peer(x: Tensor, shift: Tensor | None, num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None,
         eps: float, silu: bool, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int,
         kernel: int, stride: int, padding: int) -> Tensor:
    y = norm_peer(x, shift, num_groups, norm_weight, norm_bias, eps, silu)
    return conv_peer(y, weight, bias, residual, out_channels, kernel, stride, padding, False)


def fake(x: Tensor, shift: Tensor | None, num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None,
         eps: float, silu: bool, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int,
         kernel: int, stride: int, padding: int) -> Tensor:
    return conv_fake(x, weight, bias, residual, out_channels, kernel, stride, padding, False)


def cost(x: Tensor, shift: Tensor | None, num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None,
         eps: float, silu: bool, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out_channels: int,
         kernel: int, stride: int, padding: int) -> Cost:
    norm = norm_cost(x, shift, num_groups, norm_weight, norm_bias, eps, silu)
    product = conv_cost(x, weight, bias, residual, out_channels, kernel, stride, padding, False)
    return Cost(flops=norm.flops + product.flops, bytes=product.bytes)


def draw_norm(d: Draw, *shape: int, groups: int, layout: str, shift: bool, affine: bool, silu: bool) -> tuple:
    """Everything up to the weight."""
    n, c = shape[:2]
    return (d.normal(*shape, layout=layout, offset=0.3), d.normal(n, c) if shift else None, groups,
            d.normal(c, offset=1.0, scale=0.2) if affine else None, d.normal(c, scale=0.2) if affine else None, 1e-5,
            silu)


def cases() -> Iterator[Case]:
    def make(*shape: int, out: int, groups: int = 32, kernel: int = 3, stride: int = 1, padding: int = 1,
             layout: str = "channels_last", shift: bool = True, affine: bool = True, silu: bool = True,
             residual: bool = True):
        def draw(d: Draw):
            y = (shape[0], out, *(out_size(s, kernel, stride, padding, False) for s in shape[2:]))
            weight = d.normal(out, shape[1], kernel, kernel, scale=max(1, shape[1] * kernel * kernel) ** -0.5)
            norm = draw_norm(d, *shape, groups=groups, layout=layout, shift=shift, affine=affine, silu=silu)
            return (*norm, pack(weight), d.normal(out) if affine else None,
                    d.normal(*y, layout=layout) if residual else None, out, kernel, stride, padding)
        return draw

    yield case("sd15_64x64", "network channels_last big", make(2, 320, 64, 64, out=320))
    yield case("sd15_64x64_wide", "network channels_last big", make(2, 960, 64, 64, out=320, residual=False))
    yield case("sd15_16x16", "network channels_last big", make(2, 1280, 16, 16, out=1280))
    yield case("vae_256x256", "network channels_last big", make(1, 256, 256, 256, out=256, shift=False))
    yield case("to_latent", "network channels_last", make(2, 64, 32, 32, out=4, residual=False, shift=False))
    yield case("nchw", "", make(2, 6, 5, 4, out=7, groups=3, layout="contiguous"))
    yield case("pointwise", "channels_last", make(3, 37, 7, 5, out=33, groups=37, kernel=1, padding=0, silu=False))
    yield case("strided", "channels_last", make(2, 18, 13, 37, out=8, groups=6, stride=2, residual=False))
    yield case("wide_kernel", "channels_last", make(1, 5, 9, 40, out=3, groups=1, kernel=5, padding=2, affine=False))
    yield case("ragged", "ragged channels_last", make(2, 99, 31, 37, out=35, groups=33))
    yield case("one_pixel", "ragged channels_last", make(2, 40, 1, 1, out=3, groups=4))
    yield case("misaligned", "view", make(1, 6, 5, 4, out=7, groups=2, layout="view"))
    yield case("sliced", "view", make(1, 6, 5, 4, out=7, groups=2, layout="slice"))
    yield case("no_batch", "empty", make(0, 8, 4, 4, out=5, groups=4))


_call = register(Op("norm_conv2d", "(Tensor x, Tensor? shift, int num_groups, Tensor? norm_weight, Tensor? norm_bias, "
                    "float eps, bool silu, Tensor weight, Tensor? bias, Tensor? residual, int out_channels, "
                    "int kernel, int stride, int padding) -> Tensor", reference, fake, cases, cost, peer,
                    cpu_only=True))


@public
def norm_conv2d(x: Tensor, num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
                weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, out_channels: int,
                shift: Tensor | None = None, silu: bool = True, kernel: int = 3, stride: int = 1,
                padding: int = 1) -> Tensor:
    """conv2d(group_norm_silu(x, ...), weight, bias, residual) in one pass over x after that of the statistics; the
    normalised image is rounded to x's dtype, as if it had been stored.

    x: (N, C, H, W), floating. num_groups, norm_weight, norm_bias, eps, shift, silu: as in ``group_norm_silu``. weight,
    bias, residual, out_channels, kernel, stride, padding and the output: as in ``conv2d``.
    Raises ShapeError when sizes or dtypes do not fit.
    """
    check_norm("norm_conv2d", x, num_groups, norm_weight, norm_bias, shift)
    check("norm_conv2d", x, weight, x.dtype, bias, out_channels, kernel, stride, padding, False)
    check_residual("norm_conv2d", residual, out_shape(x, out_channels, kernel, stride, padding, False), x.dtype)
    return _call(x, shift, num_groups, norm_weight, norm_bias, eps, silu, weight, bias, residual, out_channels, kernel,
                 stride, padding)
