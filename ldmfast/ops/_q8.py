"""What the rows that end in uint8 codes share: the definition of scale, zero point and rounding, cases and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ._op import Case, Cost, case, memory_format, shape_of

RESULT = " -> (Tensor q, Tensor scale, Tensor zero_point)"
ROW_RESULT = " -> (Tensor q, Tensor scale)"  # a scale for each row, no zero point
Codes = tuple[Tensor, Tensor, Tensor]


def check_pad(op: str, x: Tensor, pad: int) -> None:
    """Only images have a border: raises ShapeError for another rank, or a negative pad."""
    if pad < 0 or (pad and x.ndim != 4):
        raise ShapeError(f"{op}: pad is {pad} for x of shape {shape_of(x)}; it is at least 0, and 0 unless x is "
                         "(N, C, H, W)")


def code_format(x: Tensor) -> torch.memory_format:
    """Memory order of the codes: channels-last for images, which is what convolutions read; x's own otherwise."""
    return torch.channels_last if x.ndim == 4 else memory_format(x)


def empty_codes(x: Tensor, shape: tuple[int, ...], layout: torch.memory_format = torch.contiguous_format) -> Codes:
    return (torch.empty(shape, dtype=torch.uint8, device=x.device, memory_format=layout),
            x.new_empty(1, dtype=torch.float32), x.new_empty(1, dtype=torch.int32))


def empty_image_codes(x: Tensor, pad: int) -> Codes:
    n, *rest = x.shape
    shape = (n, rest[0], rest[1] + 2 * pad, rest[2] + 2 * pad) if x.ndim == 4 else tuple(x.shape)
    return empty_codes(x, shape, code_format(x))


def scale_of(lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """scale = (hi - lo) / 255 in fp32 (1 if both are 0, at least 2^-126) and zero_point = round(-lo / scale), each of
    shape (1,); scale NaN and zero_point 0 if either end is not finite. lo, hi: 0-d, lo <= 0 <= hi."""
    lo, hi = lo.double().reshape(1), hi.double().reshape(1)
    scale = ((hi - lo) / 255).float()
    scale = torch.where(hi == lo, 1.0, scale.clamp(min=torch.finfo(torch.float32).tiny))
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    return scale, torch.nan_to_num(-lo / scale.double()).round().int()


def encode(y: Tensor, lo: Tensor, hi: Tensor, pad: int = 0, layout: torch.memory_format = torch.contiguous_format,
           ) -> Codes:
    """q = clamp(round(y / scale) + zero_point, 0, 255), with a border of zero_point; q is 0 where scale is NaN."""
    scale, zero = scale_of(lo, hi)
    inside = torch.nan_to_num((y / scale.to(y.dtype)).round() + zero, nan=0.0).clamp(0, 255)
    if not pad:
        return empty_codes(y, shape_of(y), layout)[0].copy_(inside), scale, zero
    n, c, h, w = y.shape
    q = empty_codes(y, (n, c, h + 2 * pad, w + 2 * pad), layout)[0].copy_(zero)
    q[:, :, pad:h + pad, pad:w + pad] = inside
    return q, scale, zero


def ends(y: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest element, zero included; NaN if there is one."""
    zero = y.new_zeros(())
    if y.numel() == 0:
        return zero, zero
    lo, hi = y.aminmax()
    return torch.minimum(lo, zero), torch.maximum(hi, zero)


def torch_encode(y: Tensor, pad: int = 0) -> Codes:
    """How a user of torch makes the codes."""
    y = y.float()
    lo, hi = ends(y)
    scale = torch.where(hi > lo, (hi - lo) / 255, 1.0)
    zero = (-lo / scale).round().int()
    q = torch.quantize_per_tensor(y, scale, zero, torch.quint8).int_repr()
    if pad:
        q = torch.nn.functional.pad(q, [pad] * 4, value=int(zero))
    return q, scale.reshape(1), zero.reshape(1)


def cost_of(plain: Cost, codes: int, dtype: torch.dtype) -> Cost:
    """The cost of an op that writes bytes in place of `codes` numbers of a dtype, and finds their range."""
    return Cost(plain.flops + 4.0 * codes, plain.bytes - codes * (dtype.itemsize - 1))


def with_pad(cases: Callable[[], Iterable[Case]]) -> Iterator[Case]:
    """The cases of the op before rounding, images with a border of one, one of them with none and with three."""
    def make(old: Case, pad: int) -> Callable[..., tuple[Any, ...]]:
        def draw(d: Any) -> tuple[Any, ...]:
            args = old.make(d)
            return (*args, pad if args[0].ndim == 4 else 0)
        return draw

    for old in cases():
        yield case(old.name, " ".join(old.tags), make(old, 1))
        if old.name == "ragged":
            yield case("ragged_no_border", "ragged", make(old, 0))
            yield case("ragged_wide_border", "ragged", make(old, 3))
