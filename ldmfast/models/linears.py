"""Linears of transformers with something beside the product: GELU at its end, or an input that is in two tensors."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from . import gemm
from .gemm import Int8Weight, Linear, Quantized
from .rowwise import RowCodes


class GeluLinear(Linear):
    """GELU, in its tanh form (Hendrycks and Gimpel 2016, section 2), of x W^T + b, inside the product."""

    own_from: ClassVar[tuple[int, int]] = (1, 1)

    def forward(self, x: Tensor | Quantized | RowCodes, residual: None = None) -> Tensor:  # type: ignore[override]
        """x: (..., in), floating, or 8-bit for a layer with ``int8`` or ``rowwise`` -> (..., out)."""
        if self.lora is not None:  # what adapters add comes before GELU, as a residual, which the fused product has not
            return F.gelu(self._with_adapters(x), approximate="tanh")
        if self.rowwise is not None:
            return F.gelu(self.rowwise(x), approximate="tanh")
        x = x.dense() if isinstance(x, RowCodes) else x
        if self.int8 is not None:
            return self._int8(self.int8, x, None)
        assert isinstance(x, Tensor)
        if self.own:
            return ops.linear_gelu_tanh(x, self.weight, self.bias, out_features=self.out_features)
        if not gemm._onednn(x):
            return F.gelu(F.linear(x, self.weight, self.bias), approximate="tanh")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")

    def _with_adapters(self, x: Tensor | Quantized | RowCodes) -> Tensor:
        dense = x.dense() if isinstance(x, RowCodes) else x
        residual = self.lora(dense, None)
        if self.rowwise is not None:
            return self.rowwise(x, residual)
        if self.int8 is not None:
            return super()._int8(self.int8, dense, residual)
        x = dense
        assert isinstance(x, Tensor)
        return gemm.linear(x, self.weight, self.bias, residual, self.out_features)

    def _int8(self, w: Int8Weight, x: Tensor | Quantized, residual: Tensor | None) -> Tensor:
        if isinstance(x, Tensor):
            x = Quantized(*ops.quantize(x))
        if w.own:
            return ops.linear_gelu_tanh_q8(*x, w.values, w.scale, w.sums, w.bias, out_features=self.out_features)
        if not w.packed or x.values.numel() == 0:
            return F.gelu(super()._int8(w, x, None), approximate="tanh")
        kind = torch.bfloat16 if gemm._WRITES_BF16 else torch.float32
        return torch.ops.onednn.qlinear_pointwise.tensor(
            *x, w.values, w.scale, w.zeros, w.bias, 1.0, 0, kind, "gelu", [], "tanh").to(torch.bfloat16)


class Int8Pair(nn.Module):
    """The two parts of a SplitLinear's weight in 8 bits, under one scale for each output."""

    def __init__(self, first: Int8Weight, rest: Int8Weight):
        super().__init__()
        self.first, self.rest = first, rest

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that the values stand for."""
        return torch.cat([self.first.dense(dtype), self.rest.dense(dtype)], dim=1)


class SplitLinear(Linear):
    """x W^T + b of an x whose channels are in two tensors, the first as wide as the output.

    Packed, it is two products, the second adding onto the first: the inputs need not be put side by side.
    """

    rest: nn.Parameter | None  # weight of the second input, once packed

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.rest = None

    def forward(self, x: tuple[Tensor, Tensor], residual: None = None) -> Tensor:  # type: ignore[override]
        """x: (..., out) and (..., in - out), floating -> (..., out)."""
        first, second = x
        if self.int8 is None and self.rest is None:
            return super().forward(torch.cat([first, second], dim=-1))
        added = None if self.lora is None else self.lora(x, None)
        if self.int8 is not None:
            pair = cast(Any, self.int8)
            return self._int8(pair.rest, second, self._int8(pair.first, first, added))
        assert self.rest is not None
        out = gemm.linear(first, self.weight, self.bias, added, self.out_features)
        return gemm.linear(second, self.rest, None, out, self.out_features)

    def pack(self) -> None:
        if self.rest is not None or not gemm.packable(self.weight):
            return
        parts = [gemm.pack_linear(part.contiguous(), self.own_from) for part in self._split(self.weight.detach())]
        self.weight, self.rest = (gemm._fixed(part) for part in parts)

    def _split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[:, :self.out_features], weight[:, self.out_features:]

    def dense(self) -> Tensor:
        if self.rest is None:
            return super().dense()
        out, wide = self.out_features, self.in_features
        return torch.cat([gemm.plain_linear(self.weight, (out, out)), gemm.plain_linear(self.rest, (out, wide - out))],
                         dim=1)

    def quantize(self, values: Tensor | None = None, scale: Tensor | None = None, keep: bool = False) -> None:
        if values is None or scale is None:
            values, scale = gemm.rows_to_int8(self.dense())
        if not keep:
            self.register_parameter("weight", None)
            self.rest = None
        first, rest = (part.contiguous() for part in self._split(values))
        self.int8 = cast(Any, Int8Pair(Int8Weight(first, scale, self.bias, self), Int8Weight(rest, scale, None, self)))
