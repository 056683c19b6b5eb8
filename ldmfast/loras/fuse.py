"""The fused mode: layers whose weight is W + w1 up1 down1 + w2 up2 down2 (Hu et al. 2021, section 4.1), packed as the
layer was. They are new layers: the network they come from keeps its own, so going back is bit-exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.gemm import Conv2d
from ..models.linears import SplitLinear
from ..models.rowwise import RowwiseWeight, rows_to_int8
from .side import Layer, Pair
from .twin import shallow


def fused(layer: Layer, pairs: Sequence[tuple[Pair, float]], known: dict[int, Any]) -> Layer:
    """The layer with the adapters in its weight. known: what was fused already of the tensors that several layers
    share (a network's variants); empty at first. An 8-bit layer is rounded again."""
    new = shallow(layer)
    weight = layer._parameters["weight"]
    held = layer.layout if isinstance(layer, Conv2d) else None
    if weight is not None or held is not None:
        key = id(held if weight is None else weight)
        if key not in known:
            known[key] = _fused_float(layer, pairs)
        weight, rest, held = known[key]
        vars(new)["_parameters"]["weight"] = weight
        if isinstance(new, SplitLinear):
            vars(new)["_parameters"]["rest"] = rest
        if isinstance(new, Conv2d):
            new.layout = held
    if layer.int8 is not None:
        if id(layer.int8) not in known:
            sums = _added(layer.int8.dense(torch.float32), pairs)
            scratch = shallow(layer)
            scratch.quantize(*rows_to_int8(sums), keep=True)
            known[id(layer.int8)] = scratch.int8
        new.int8 = known[id(layer.int8)]
    rowwise = getattr(layer, "rowwise", None)
    if rowwise is not None:
        if id(rowwise) not in known:
            known[id(rowwise)] = RowwiseWeight(_added(rowwise.dense(torch.float32), pairs), rowwise.bias, rowwise.form)
        vars(new)["_modules"]["rowwise"] = known[id(rowwise)]
    return new


def _fused_float(layer: Layer, pairs: Sequence[tuple[Pair, float]]) -> tuple[Any, Any, Any]:
    """The new weight, that of a second input, and that in a convolution's layout; None for what there is not."""
    weight = layer._parameters["weight"]
    packed = weight is None or weight.is_mkldnn or weight.ndim == 7
    new = shallow(layer)
    dense = layer.dense()
    new.weight = nn.Parameter(_added(dense, pairs).to(dense.dtype), requires_grad=False)
    if isinstance(new, Conv2d):
        new.layout = None
    if isinstance(new, SplitLinear):
        new.rest = None
    if packed:
        new.pack()
    return new._parameters["weight"], new._parameters.get("rest"), new.layout if isinstance(new, Conv2d) else None


def _added(weight: Tensor, pairs: Sequence[tuple[Pair, float]]) -> Tensor:
    """fp32, laid out as the weight."""
    total = weight.float()
    for pair, w in pairs:
        part = pair.up.float() @ pair.down.flatten(1).float()
        total = total + w * part.view(weight.shape)
    return total
