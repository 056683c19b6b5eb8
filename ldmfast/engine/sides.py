"""Adapters beside a recorded network: their matrices and weights lie in buffers, which each call fills with its own."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from ..loras.side import Pair, Side
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
    sides = ((i, getattr(m, "lora", None)) for i, m in enumerate(network.modules()))
    adapters = tuple((i, *((p.down.shape, p.ordered.shape, p.down.dtype) for p, _ in s.pairs)) for i, s in sides
                     if isinstance(s, Side))
    return tensors, adapters


def own(network: nn.Module) -> nn.Module:
    """The network with copies of its adapters' matrices and weights, to be written; all else is shared. Itself without
    adapters."""
    changed: dict[nn.Module, nn.Module] = {}
    for layer in _layers(network):
        new = shallow(layer)
        side = copy.copy(layer.lora)
        side.pairs = [(Pair(p.down.clone(), p.up, p.ordered.clone()), torch.full((1,), w, device=p.down.device))
                      for p, w in side.pairs]
        vars(new)["lora"] = side
        changed[layer] = new
    found: nn.Module = twin(network, changed) if changed else network  # type: ignore[arg-type]
    return found


class Sides:
    """The buffers of a network that ``own`` gave."""

    def __init__(self, network: nn.Module) -> None:
        self.pairs = _pairs(network)

    def load(self, network: nn.Module) -> None:
        """Copies the adapters of another network of the same identity into them."""
        given = _pairs(network) if self.pairs else []
        if not given or given[0][0] is self.pairs[0][0]:
            return
        buffers, values = ([t for p, _ in pairs for t in (p.down, p.ordered)] for pairs in (self.pairs, given))
        torch._foreach_copy_(buffers, values)
        for (_, weight), (_, w) in zip(self.pairs, given):
            weight.fill_(w)


def _pairs(network: nn.Module) -> list[tuple[Pair, Any]]:
    return [pair for layer in _layers(network) for pair in layer.lora.pairs]
