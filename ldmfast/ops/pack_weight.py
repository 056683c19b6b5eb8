"""pack_weight: a weight in the order in which conv2d and conv2d_q8 read it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ShapeError
from ._faults import public
from ._op import Case, Cost, Op, case, nbytes, numel, register, shape_of

TILE, OUTPUTS = 16, 32  # outputs of a tile, and of a panel of two
GROUPS = {torch.bfloat16: 2, torch.int8: 4}  # channels side by side for each output; 1 of other dtypes


def packed_shape(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the packed form of a weight: output = 32 panel + 16 half + column and channel = (16 chunk + row) group +
    the last index, of indices (panel, chunk, tap, half, row, column, .)."""
    group = GROUPS.get(dtype, 1)
    return (-(-shape[0] // OUTPUTS), -(-shape[1] // (TILE * group)), numel(shape[2:]), 2, TILE, TILE, group)


def image_weight(packed: Tensor, outputs: int, channels: int) -> Tensor:
    """The weight (outputs, channels, kernel, kernel) that was packed."""
    panels, chunks, taps, _, _, _, group = packed.shape
    kernel = math.isqrt(int(taps))
    order = packed.permute(0, 3, 5, 1, 4, 6, 2)  # panel, half, column; chunk, row, group; tap
    whole = order.reshape(panels * OUTPUTS, chunks * TILE * group, kernel, kernel)
    return whole[:outputs, :channels]


_kept: tuple[weakref.ref[Tensor], Tensor] | None = None


def peer_weight(packed: Tensor, weight: Tensor) -> Tensor:
    """``weight``, as torch takes it, kept while the same packed one comes again: what a peer is given ready-made."""
    global _kept
    kept = _kept
    if kept is None or kept[0]() is not packed:
        kept = _kept = (weakref.ref(packed), weight)
    return kept[1]


def reference(weight: Tensor) -> Tensor:
    panels, chunks, taps, _, _, _, group = packed_shape(weight.shape, weight.dtype)
    rows = weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(2)
    rows = F.pad(rows, (0, 0, 0, chunks * TILE * group - rows.shape[1], 0, panels * OUTPUTS - rows.shape[0]))
    parts = rows.reshape(panels, 2, TILE, chunks, TILE, group, taps)
    return fake(weight).copy_(parts.permute(0, 3, 6, 1, 4, 2, 5))


peer = reference


def fake(weight: Tensor) -> Tensor:
    return weight.new_empty(packed_shape(weight.shape, weight.dtype))


def cost(weight: Tensor) -> Cost:
    return Cost(flops=0.0, bytes=2 * nbytes(weight))


def cases() -> Iterator[Case]:
    def make(*shape: int, layout: str = "contiguous"):
        return lambda d: (d.normal(*shape, layout=layout),)

    def codes(*shape: int):
        return lambda d: ((d.normal(*shape) * 40).clamp(-127, 127).to(torch.int8),)

    yield case("sd15_linear", "network", make(1280, 320))
    yield case("sd15_conv", "network", make(320, 320, 3, 3))
    yield case("channels_last", "channels_last", make(40, 70, 3, 3, layout="channels_last"))
    yield case("int8", "", codes(40, 70, 3, 3))
    yield case("ragged", "ragged", make(33, 17))
    yield case("ragged_conv", "ragged", make(5, 3, 3, 3))
    yield case("one", "ragged", make(1, 1))
    yield case("misaligned", "view", make(16, 32, layout="view"))
    yield case("sliced", "view", make(16, 32, layout="slice"))
    yield case("no_outputs", "empty", make(0, 4))
    yield case("no_channels", "empty", make(4, 0))


_call = register(Op("pack_weight", "(Tensor weight) -> Tensor", reference, fake, cases, cost, peer, cpu_only=True))


@public
def pack_weight(weight: Tensor) -> Tensor:
    """A weight (outputs, channels) or (outputs, channels, kernel, kernel), floating or int8, in our products' order.

    Returns a contiguous tensor (panels, chunks, taps, 2, 16, 16, group) of the same dtype: panels of 32 outputs as
    two tiles of 16, chunks of 16 * group channels, group 2 for bfloat16, 4 for int8, otherwise 1; filled up with zeros.
    ``conv2d`` and ``conv2d_q8`` take it.
    Raises ShapeError for another rank, or a kernel that is not square.
    """
    if weight.ndim not in (2, 4) or (weight.ndim == 4 and weight.shape[2] != weight.shape[3]):
        raise ShapeError(f"pack_weight: weight has shape {shape_of(weight)}, needs (outputs, channels) or (outputs, "
                         "channels, kernel, kernel)")
    return _call(weight)
