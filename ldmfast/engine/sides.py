"""Adapters beside a recorded network: their matrices lie in buffers, which each call fills with those of its own."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ..loras.side import Side
from ..loras.twin import shallow, twin


def _layers(network: nn.Module) -> list[Any]:
    """The layers with adapters, in the order of the network's modules."""
    return [m for m in network.modules() if isinstance(getattr(m, "lora", None), Side)]


def identity(network: nn.Module) -> Hashable:
    """What a recorded network is the network of, however its adapters are called and weighted: itself where it has
    none, else the tensors it has and the shapes of the adapters' matrices. Tensors are named by their id, so whoever
    keeps this must keep the network."""
    if not _layers(network):
        return id(network)
    tensors = tuple(id(t) for t in (*network.parameters(), *network.buffers()))
    adapters = tuple((i, m.lora.down.shape, m.lora.up.shape, m.lora.down.dtype) for i, m in enumerate(network.modules())
                     if isinstance(getattr(m, "lora", None), Side))
    return tensors, adapters


def own(network: nn.Module) -> nn.Module:
    """The network with copies of its adapters' matrices, to be written; all else is shared. Itself without adapters."""
    changed: dict[nn.Module, nn.Module] = {}
    for layer in _layers(network):
        new = shallow(layer)
        side = copy.copy(layer.lora)
        side.down, side.up = (t.clone(memory_format=torch.preserve_format) for t in (side.down, side.up))
        vars(new)["lora"] = side
        changed[layer] = new
    found: nn.Module = twin(network, changed) if changed else network  # type: ignore[arg-type]
    return found


class Sides:
    """The buffers of a network that ``own`` gave."""

    def __init__(self, network: nn.Module) -> None:
        self.buffers = _matrices(network)

    def load(self, network: nn.Module) -> None:
        """Copies the matrices of another network of the same identity into them."""
        values = _matrices(network) if self.buffers else []
        if values and values[0] is not self.buffers[0]:
            torch._foreach_copy_(self.buffers, values)


def _matrices(network: nn.Module) -> list[Tensor]:
    return [t for layer in _layers(network) for t in (layer.lora.down, layer.lora.up)]
