"""norm_conv2d_q8: group_norm_silu_q8 and the convolution of its codes, which are never in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, register, shape_of
from .conv2d import check, check_residual, out_shape, out_size
from .conv2d_q8 import check_products, check_weight_codes, draw_weight
from .conv2d_q8 import peer as conv_peer
from .conv2d_q8 import reference as conv_reference
from .group_norm_silu import check as check_norm
from .group_norm_silu_q8 import peer as norm_peer
from .group_norm_silu_q8 import reference as norm_reference
from .norm_conv2d import cost as plain_cost
from .norm_conv2d import draw_norm
from .norm_conv2d import fake as plain_fake


def reference(x: Tensor, shift: Tensor | None, num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None,
              eps: float, silu: bool, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor, bias: Tensor | None,
              residual: Tensor | None, out_channels: int, kernel: int, stride: int, padding: int) -> Tensor:
    codes = norm_reference(x, shift, num_groups, norm_weight, norm_bias, eps, silu, 0)
    wide = accumulator(x)
    added = x.new_zeros(out_channels, dtype=wide) if bias is None else bias.to(wide)  # its dtype is the result's
    y = conv_reference(*codes, weight, weight_scale, weight_sums, added,
                       None if residual is None else residual.to(wide), out_channels, kernel, stride, padding, False)
    return y.to(x.dtype)


def peer(x: Tensor, shift: Tensor | None, num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None,
         eps: float, silu: bool, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor, bias: Tensor | None,
         residual: Tensor | None, out_channels: int, kernel: int, stride: int, padding: int) -> Tensor:
    codes = norm_peer(x, shift, num_groups, norm_weight, norm_bias, eps, silu, 0)
    return conv_peer(*codes, weight, weight_scale, weight_sums, bias, residual, out_channels, kernel, stride,
                          padding, False).to(x.dtype)


def fake(x: Tensor, shift: Tensor | None, num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None,
         eps: float, silu: bool, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor, bias: Tensor | None,
         residual: Tensor | None, out_channels: int, kernel: int, stride: int, padding: int) -> Tensor:
    return plain_fake(x, shift, num_groups, norm_weight, norm_bias, eps, silu, weight, bias, residual, out_channels,
                      kernel, stride, padding)


def cost(x: Tensor, shift: Tensor | None, num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None,
         eps: float, silu: bool, weight: Tensor, weight_scale: Tensor, weight_sums: Tensor, bias: Tensor | None,
         residual: Tensor | None, out_channels: int, kernel: int, stride: int, padding: int) -> Cost:
    return plain_cost(x, shift, num_groups, norm_weight, norm_bias, eps, silu, weight, bias, residual, out_channels,
                      kernel, stride, padding)


def cases() -> Iterator[Case]:
    def make(*shape: int, out: int, groups: int = 32, kernel: int = 3, stride: int = 1, padding: int = 1,
             layout: str = "channels_last", shift: bool = True, silu: bool = True, residual: bool = True,
             bias: bool = True):
        def draw(d: Draw):
            y = (shape[0], out, *(out_size(s, kernel, stride, padding, False) for s in shape[2:]))
            norm = draw_norm(d, *shape, groups=groups, layout=layout, shift=shift, affine=True, silu=silu)
            return (*norm, *draw_weight(d, out, shape[1], kernel, kernel), d.normal(out) if bias else None,
                    d.normal(*y, layout=layout) if residual else None, out, kernel, stride, padding)
        return draw

    yield case("sd15_64x64", "network channels_last big", make(2, 320, 64, 64, out=320))
    yield case("sd15_16x16", "network channels_last big", make(2, 1280, 16, 16, out=1280))
    yield case("small", "network channels_last", make(2, 64, 16, 16, out=64))
    yield case("no_bias", "channels_last", make(1, 64, 5, 6, out=32, bias=False, residual=False))
    yield case("nchw", "", make(2, 6, 5, 4, out=7, groups=3, layout="contiguous"))
    yield case("pointwise", "channels_last", make(3, 74, 7, 5, out=33, groups=37, kernel=1, padding=0, silu=False))
    yield case("strided", "channels_last", make(2, 18, 13, 37, out=8, groups=6, stride=2, residual=False))
    yield case("ragged", "ragged channels_last", make(2, 99, 31, 37, out=35, groups=33))
    yield case("one_pixel", "ragged channels_last", make(2, 40, 1, 1, out=3, groups=4))
    yield case("misaligned", "view", make(1, 6, 5, 4, out=7, groups=2, layout="view"))
    yield case("no_batch", "empty", make(0, 8, 4, 4, out=5, groups=4))


_call = register(Op("norm_conv2d_q8", "(Tensor x, Tensor? shift, int num_groups, Tensor? norm_weight, "
                    "Tensor? norm_bias, float eps, bool silu, Tensor weight, Tensor weight_scale, Tensor weight_sums, "
                    "Tensor? bias, Tensor? residual, int out_channels, int kernel, int stride, int padding) -> Tensor",
                    reference, fake, cases, cost, peer, cpu_only=True))


@public
def norm_conv2d_q8(x: Tensor, num_groups: int, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
                   weight: Tensor, weight_scale: Tensor, weight_sums: Tensor, bias: Tensor | None = None,
                   residual: Tensor | None = None, *, out_channels: int, shift: Tensor | None = None,
                   silu: bool = True, kernel: int = 3, stride: int = 1, padding: int = 1) -> Tensor:
    """conv2d_q8(*group_norm_silu_q8(x, ...), weight, ...) in one pass over x after that of the statistics.

    x: (N, C, H, W), floating. num_groups, norm_weight, norm_bias, eps, shift, silu: as in ``group_norm_silu_q8``.
    weight, weight_scale, weight_sums, bias, out_channels, kernel, stride, padding: as in ``conv2d_q8``. residual: like
    the output, which is (N, out_channels, H', W') in channels-last memory, x's dtype.
    Raises ShapeError when sizes or dtypes do not fit, or if a sum could exceed 32 bits.
    """
    check_norm("norm_conv2d_q8", x, num_groups, norm_weight, norm_bias, shift)
    check("norm_conv2d_q8", x, weight, torch.int8, bias, out_channels, kernel, stride, padding, False)
    check_weight_codes("norm_conv2d_q8", weight_scale, weight_sums, out_channels)
    check_products("norm_conv2d_q8", x.shape[1] * kernel * kernel)
    check_residual("norm_conv2d_q8", residual, out_shape(x, out_channels, kernel, stride, padding, False), x.dtype)
    if bias is not None and not bias.is_floating_point():
        raise ShapeError(f"norm_conv2d_q8: bias is {bias.dtype} {shape_of(bias)}, needs floating numbers")
    return _call(x, shift, num_groups, norm_weight, norm_bias, eps, silu, weight, weight_scale, weight_sums, bias,
                 residual, out_channels, kernel, stride, padding)
