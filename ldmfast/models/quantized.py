"""Activations of 8 bits."""

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
