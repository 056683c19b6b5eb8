"""The side path: y = W x + b + up(down(x)) with W as it is, packed or in 8 bits (Hu et al. 2021, equation 3).

What adapters add is computed first and enters the layer's own product as its residual, where it costs no pass of its
own. A weight multiplies down(x), which is small: matrices are nowhere copied, so a swap costs the same whatever is
chosen (copies of an SD 1.5 LoRA of rank 64 take 25 ms of page faults, two of them 55).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..models.gemm import Conv2d, GatedLinear, Linear, Quantized, linear
from ..models.layers import as_image, as_tokens
from ..ops.linear_geglu import side_by_side
from ..ops.pack_weight import TILE
from .twin import shallow

Layer = Linear | Conv2d


@dataclass(frozen=True, eq=False)
class Pair:
    """LoRA of one layer, in the network's dtype. down: (R, in), or (R, in, k, k) for kernels above 1. up: (out, R),
    times alpha / r. ordered: up with its rows in the order in which the layer computes them."""

    down: Tensor
    up: Tensor
    ordered: Tensor


def own_order(layer: Layer) -> bool:
    """Whether the layer computes values and gates in the order of ops.linear_geglu."""
    return isinstance(layer, GatedLinear) and (layer.own if layer.int8 is None else layer.int8.own)


def pair(layer: Layer, down: Tensor, up: Tensor) -> Pair:
    return Pair(down, up, side_by_side(up) if own_order(layer) else up)


class Side:
    """What adapters add to one layer, in place of its residual."""

    def __init__(self, layer: Layer, pairs: Sequence[tuple[Pair, float]]):
        self.pairs = tuple(pairs)
        self.border = layer.border
        self.stride: tuple[int, ...] = ()
        if isinstance(layer, Conv2d) and layer.kernel_size != (1, 1):
            self.stride, self.padding = layer.stride, layer.padding

    def __call__(self, x: Any, residual: Tensor | None, upsample: bool = False) -> Tensor:
        """x: as the layer takes it. residual: like its output. Returns the sum of w up(down(x)), and residual, like its
        output."""
        if isinstance(x, tuple) and not isinstance(x, Quantized):
            return self._up([self._down_both(x, p.down) for p, _ in self.pairs], None, residual)
        scale = x.scale if isinstance(x, Quantized) else None
        x = self._centred(x) if isinstance(x, Quantized) else x
        if x.ndim != 4:
            return self._sum(x, scale, residual)
        x = ops.upsample2x(x) if upsample else x
        rows = None if residual is None else as_tokens(residual)
        if self.stride:
            image = [F.conv2d(x, p.down, None, self.stride, self.padding) for p, _ in self.pairs]
            return as_image(self._up([as_tokens(h) for h in image], scale, rows), *image[0].shape[2:])
        return as_image(self._sum(as_tokens(x), scale, rows), *x.shape[2:])

    def _sum(self, x: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
        return self._up([linear(x, p.down.flatten(1), None, None) for p, _ in self.pairs], scale, residual)

    @staticmethod
    def _down_both(x: tuple[Tensor, Tensor], down: Tensor) -> Tensor:
        """Of an input whose channels are in two tensors."""
        first, rest = (part.contiguous() for part in down.split([t.shape[-1] for t in x], dim=1))
        return linear(x[1], rest, None, linear(x[0], first, None, None))

    def _up(self, inner: Sequence[Tensor], scale: Tensor | None, residual: Tensor | None) -> Tensor:
        out = residual
        for h, (p, w) in zip(inner, self.pairs):
            if scale is not None:
                h.mul_(scale * w)
            elif isinstance(w, Tensor) or w != 1:
                h.mul_(w)
            out = linear(h, p.ordered, None, out)
        assert out is not None
        return out

    def _centred(self, x: Quantized) -> Tensor:
        """Codes minus their zero point, which bf16 holds exactly; without the border."""
        q, p = x.values, self.border
        q = q[..., p:q.shape[-2] - p, p:q.shape[-1] - p] if p else q
        memory = torch.channels_last if q.ndim == 4 else torch.contiguous_format
        return q.to(torch.bfloat16, memory_format=memory).sub_(x.zero_point)

    def values_gates(self, layer: GatedLinear, x: Tensor | Quantized) -> Tensor:
        """The linear of a GEGLU with what adapters add, (..., 2 D) values before gates, from the weight that is packed
        for ops.linear_geglu: to the kernels that is a convolution of one pixel whose outputs are in another order."""
        q = x if layer.int8 is None or isinstance(x, Quantized) else Quantized(*ops.quantize(x))
        codes = q.values if isinstance(q, Quantized) else q
        rows = codes.shape[:-1].numel()
        wide = math.gcd(rows, 64)  # the kernel shares out rows of pixels: as one row it takes 14 times as long
        size = (1, rows // wide, wide) if wide >= 16 else (1, 1, rows)
        image = codes.reshape(*size, codes.shape[-1]).permute(0, 3, 1, 2)
        beside = self(q, None)
        outputs = beside.shape[-1]
        residual = beside.reshape(*size, outputs).permute(0, 3, 1, 2)
        w = layer.int8
        if w is None:
            y = ops.conv2d(image, layer.weight, _ordered(layer.bias), residual, out_channels=outputs, kernel=1,
                           padding=0)
        else:
            assert isinstance(q, Quantized)
            y = ops.conv2d_q8(image, q.scale, q.zero_point, w.values, side_by_side(w.scale),
                              side_by_side(w.sums), _ordered(w.bias), residual, out_channels=outputs,
                              kernel=1, padding=0)
        inner = layer.out_features // 2
        halves = y.permute(0, 2, 3, 1).reshape(*codes.shape[:-1], outputs // (2 * TILE), 2, TILE).transpose(-3, -2)
        return halves.flatten(-2)[..., :inner].flatten(-2)


def _ordered(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else side_by_side(bias)


def with_side(layer: Layer, pairs: Sequence[tuple[Pair, float]]) -> Layer:
    """The layer with the adapters beside it; what it shares with ``layer`` is all else."""
    new = shallow(layer)
    vars(new)["lora"] = Side(layer, pairs)
    return new
