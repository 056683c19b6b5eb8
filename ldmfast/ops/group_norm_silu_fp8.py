"""group_norm_silu_fp8: group_norm_silu straight to e4m3 codes under a given scale, in the same passes over memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, memory_format, register, shape_of
from .group_norm_silu import cases as plain_cases
from .group_norm_silu import check
from .group_norm_silu import cost as plain_cost
from .group_norm_silu import peer as plain_peer
from .group_norm_silu import reference as plain_reference

LARGEST = 448.0  # of e4m3


def _encode(y: Tensor, scale: Tensor) -> Tensor:
    """Saturated; NaN stays NaN."""
    return (y / scale.to(y.dtype)).clamp(-LARGEST, LARGEST).float().to(torch.float8_e4m3fn)


def reference(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
              eps: float, silu: bool, scale: Tensor) -> Tensor:
    y = plain_reference(x.to(accumulator(x)), shift, num_groups, weight, bias, eps, silu)
    return fake(x, shift, num_groups, weight, bias, eps, silu, scale).copy_(_encode(y, scale))


def peer(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
         eps: float, silu: bool, scale: Tensor) -> Tensor:
    return _encode(plain_peer(x, shift, num_groups, weight, bias, eps, silu), scale)


def fake(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
         eps: float, silu: bool, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=memory_format(x))


def cost(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
         eps: float, silu: bool, scale: Tensor) -> Cost:
    plain = plain_cost(x, shift, num_groups, weight, bias, eps, silu)
    return Cost(plain.flops + 2.0 * x.numel(), plain.bytes - x.numel() * (x.dtype.itemsize - 1))


def cases() -> Iterator[Case]:
    def make(old: Case, scale: float) -> Any:
        def draw(d: Draw) -> tuple[Any, ...]:
            return (*old.make(d), torch.full((1,), scale))
        return draw

    few = {"sd15_64x64_shift", "sd15_16x16", "plain", "ragged", "ragged_nchw", "far_mean", "misaligned", "no_batch"}
    for old in plain_cases():
        if old.name in few:
            yield case(old.name, " ".join(old.tags), make(old, 0.01))
    old = next(c for c in plain_cases() if c.name == "ragged")
    yield case("saturates", "ragged", make(old, 0.001))
    yield case("below_the_normal", "ragged", make(old, 100.0))


_call = register(Op("group_norm_silu_fp8", "(Tensor x, Tensor? shift, int num_groups, Tensor? weight, Tensor? bias, "
                    "float eps, bool silu, Tensor scale) -> Tensor", reference, fake, cases, cost, peer, gpu_only=True))


@public
def group_norm_silu_fp8(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
                        eps: float = 1e-5, *, scale: Tensor, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    """e4m3 codes of y = group_norm_silu(x, ...), which is never in memory itself: y is about q * scale.

    Arguments as in group_norm_silu. scale: float32 (1,), above 0, on x's device, measured beforehand: no pass over y
    finds it. Result: float8_e4m3fn of x's shape and layout; beyond 448 * scale it saturates, NaN stays NaN.
    For GPUs: on a CPU the reference runs. Raises ShapeError when sizes do not fit.
    """
    check("group_norm_silu_fp8", x, num_groups, weight, bias, shift)
    if scale.shape != (1,) or scale.dtype != torch.float32:
        raise ShapeError(f"group_norm_silu_fp8: scale is {scale.dtype} {shape_of(scale)}, needs float32 (1,)")
    return _call(x, shift, num_groups, weight, bias, eps, silu, scale)
