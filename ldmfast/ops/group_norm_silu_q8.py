"""group_norm_silu_q8: group_norm_silu straight to uint8 codes, in the same two passes over memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._faults import public
from ._op import Case, Cost, Op, accumulator, register
from ._q8 import RESULT, Codes, check_pad, code_format, cost_of, empty_image_codes, encode, ends, torch_encode, with_pad
from .group_norm_silu import cases as plain_cases
from .group_norm_silu import check
from .group_norm_silu import cost as plain_cost
from .group_norm_silu import peer as plain_peer
from .group_norm_silu import reference as plain_reference

SILU_MINIMUM, SILU_MINIMUM_AT = -0.2784645427610738, -1.2784645427610738


def reference(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
              eps: float, silu: bool, pad: int) -> Codes:
    y = plain_reference(x.to(accumulator(x)), shift, num_groups, weight, bias, eps, False)
    if not silu or y.numel() == 0:
        return encode(y, *ends(y), pad, code_format(x))
    low, high = y.reshape(*y.shape[:2], -1).aminmax(dim=-1)
    y = y * torch.sigmoid(y)
    lo, hi = ends(y)
    across = (low < SILU_MINIMUM_AT) & (high > SILU_MINIMUM_AT)
    return encode(y, torch.where(across.any(), torch.clamp(lo, max=SILU_MINIMUM), lo), hi, pad, code_format(x))


def peer(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
         eps: float, silu: bool, pad: int) -> Codes:
    return torch_encode(plain_peer(x, shift, num_groups, weight, bias, eps, silu), pad)


def fake(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
         eps: float, silu: bool, pad: int) -> Codes:
    return empty_image_codes(x, pad)


def cost(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None,
         eps: float, silu: bool, pad: int) -> Cost:
    return cost_of(plain_cost(x, shift, num_groups, weight, bias, eps, silu), x.numel(), x.dtype)


def cases() -> Iterator[Case]:
    return with_pad(plain_cases)


_call = register(Op("group_norm_silu_q8", "(Tensor x, Tensor? shift, int num_groups, Tensor? weight, Tensor? bias, "
                    "float eps, bool silu, int pad)" + RESULT, reference, fake, cases, cost, peer, cpu_only=True))


@public
def group_norm_silu_q8(x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
                       eps: float = 1e-5, *, shift: Tensor | None = None, silu: bool = True, pad: int = 0) -> Codes:
    """uint8 codes of y = group_norm_silu(x, ...), which is never in memory itself: y is about (q - zero_point) * scale.

    Arguments as in group_norm_silu; result, border and formula as in quantize, with this range of y: the results at
    each channel's least and largest x, and SiLU's minimum, -0.27846, if a channel has numbers on both sides of it.
    Raises ShapeError when sizes do not fit, or for a border around something that is no image.
    """
    check("group_norm_silu_q8", x, num_groups, weight, bias, shift)
    check_pad("group_norm_silu_q8", x, pad)
    return _call(x, shift, num_groups, weight, bias, eps, silu, pad)
