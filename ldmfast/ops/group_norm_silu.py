"""group_norm_silu: (x + shift) -> GroupNorm -> SiLU in one pass over memory, channels-last or not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, memory_format, nbytes, register, shape_of


def reference(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
              eps: float, silu: bool) -> Tensor:
    dtype = accumulator(x)
    n, c = x.shape[:2]
    per_channel = (1, c) + (1,) * (x.ndim - 2)
    y = x.to(dtype)
    if shift is not None:
        y = y + shift.to(dtype).reshape(n, *per_channel[1:])
    groups = y.reshape(n, num_groups, y[0].numel() // num_groups if n else 0)
    mean = groups.mean(-1, keepdim=True)
    variance = (groups - mean).square().mean(-1, keepdim=True)
    y = ((groups - mean) * (variance + eps).rsqrt()).reshape(x.shape)
    if weight is not None:
        y = y * weight.to(dtype).reshape(per_channel)
    if bias is not None:
        y = y + bias.to(dtype).reshape(per_channel)
    if silu:
        y = y * torch.sigmoid(y)
    return torch.empty_like(x, memory_format=memory_format(x)).copy_(y)


def peer(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
         eps: float, silu: bool) -> Tensor:
    if shift is not None:
        x = x + shift.reshape(*shift.shape, *(1,) * (x.ndim - 2))
    y = torch.nn.functional.group_norm(x, num_groups, weight, bias, eps)
    return torch.nn.functional.silu(y) if silu else y


def fake(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
         eps: float, silu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def cost(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
         eps: float, silu: bool) -> Cost:
    return Cost(flops=x.numel() * (12.0 if silu else 7.0), bytes=2 * nbytes(x) + nbytes(shift, weight, bias))


def cases() -> Iterator[Case]:
    def make(shape: tuple[int, ...], groups: int, *, layout: str = "contiguous", affine: bool = True,
             shift: bool = False, silu: bool = True, eps: float = 1e-5, offset: float = 0.3,
             shift_layout: str = "contiguous"):
        def draw(d: Draw) -> tuple:
            n, c = shape[:2]
            return (d.normal(*shape, layout=layout, offset=offset),
                    d.normal(n, c, layout=shift_layout) if shift else None, groups,
                    d.normal(c, offset=1.0, scale=0.2) if affine else None,
                    d.normal(c, scale=0.2) if affine else None, eps, silu)
        return draw

    cl = "channels_last"
    yield case("sd15_64x64", "network channels_last big", make((2, 320, 64, 64), 32, layout=cl))
    yield case("sd15_64x64_shift", "network channels_last big",
               make((2, 320, 64, 64), 32, layout=cl, shift=True))
    yield case("sd15_16x16", "network channels_last", make((2, 1280, 16, 16), 32, layout=cl, shift=True))
    yield case("sd15_32x32_nchw", "network", make((2, 640, 32, 32), 32))
    yield case("vae_128x128", "network channels_last big", make((1, 512, 128, 128), 32, layout=cl, eps=1e-6))
    yield case("attention_norm", "network channels_last",
               make((2, 320, 16, 16), 32, layout=cl, silu=False, eps=1e-6))
    yield case("tokens", "network", make((2, 64, 77), 8))
    yield case("plain", "", make((3, 12, 5, 7), 3, affine=False))
    yield case("one_group", "channels_last", make((2, 24, 6, 6), 1, layout=cl, shift=True))
    yield case("one_channel_groups", "channels_last", make((2, 37, 5, 3), 37, layout=cl))
    yield case("ragged", "ragged channels_last", make((1, 93, 61, 11), 31, layout=cl))
    yield case("ragged_nchw", "ragged", make((3, 10, 13, 7), 5, shift=True))
    yield case("no_spatial", "ragged", make((5, 48), 4))
    yield case("volume", "channels_last", make((1, 16, 3, 5, 4), 4, layout=cl))
    yield case("far_mean", "channels_last", make((1, 32, 16, 16), 8, layout=cl, offset=30.0))
    yield case("misaligned", "view", make((2, 32, 9, 5), 8, layout="view", shift=True))
    yield case("sliced", "view", make((2, 32, 9, 5), 8, layout="slice"))
    yield case("shift_of_a_wider_row", "view channels_last",
               make((2, 32, 9, 5), 8, layout=cl, shift=True, shift_layout="slice"))
    yield case("no_batch", "empty", make((0, 32, 8, 8), 8))
    yield case("no_pixels", "empty", make((2, 32, 0, 8), 8, layout=cl))


_call = register(Op("group_norm_silu", "(Tensor x, Tensor? shift, int num_groups, Tensor? weight, "
                    "Tensor? bias, float eps, bool silu) -> Tensor", reference, fake, cases, cost, peer))


def check(op: str, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None,
          shift: Tensor | None) -> None:
    shape = x.shape
    if len(shape) < 2:
        raise ShapeError(f"{op}: x has {x.ndim} dimensions, needs (N, C, *spatial)")
    c = shape[1]
    if num_groups < 1 or c % num_groups:
        raise ShapeError(f"{op}: {c} channels do not split into {num_groups} groups; "
                         "give a number of groups that divides the channels")
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != (c,):
            raise ShapeError(f"{op}: {name} has shape {shape_of(p)}, needs ({c},)")
    if shift is not None and shift.shape != (shape[0], c):
        raise ShapeError(f"{op}: shift has shape {shape_of(shift)}, needs ({shape[0]}, {c})")


@public
def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
                    eps: float = 1e-5, *, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    """GroupNorm(x + shift), then SiLU: y * sigmoid(y) (Wu and He 2018, equation 1; ResBlock of DDPM).

    x: (N, C, *spatial), floating, channels-last or contiguous; the output has x's dtype and layout.
    num_groups divides C. weight, bias: (C,). shift: (N, C), the time embedding, added before the statistics.
    Statistics are taken in fp32 (fp64 for fp64). silu=False leaves the activation out.
    Raises ShapeError when sizes do not fit.
    """
    check("group_norm_silu", x, num_groups, weight, bias, shift)
    return _call(x, shift, num_groups, weight, bias, eps, silu)
