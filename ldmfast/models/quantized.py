"""Activations of 8 bits, and what their zero point adds to a product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Quantized(NamedTuple):
    """An activation of 8 bits: (values - zero_point) * scale, one scale for the tensor.

    values: uint8 tokens (..., C), or an image (N, C, H + 2 p, W + 2 p), channels-last, that carries its own padding.
    scale: fp32 (1,). zero_point: int32 (1,).
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The numbers that the codes stand for."""
        return ((self.values.float() - self.zero_point) * self.scale).to(dtype)


_AT_ONCE = 1 << 20  # numbers of a weight that are converted at a time: they stay in cache


def weight_sums(values: Tensor) -> Tensor:
    """Of each output's int8 values, int32. In floating point, exactly: torch's integer sums take ten times as long."""
    rows = values.flatten(1)
    wide = torch.float32 if 127 * rows.shape[1] < 2**24 else torch.float64
    some = max(1, _AT_ONCE // max(1, rows.shape[1]))
    return torch.cat([part.to(wide).sum(1).int() for part in rows.split(some)]) if len(rows) else rows.sum(1).int()
