"""An adapter: LoRA matrices put to the layers of the networks they were made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.base import Model
from ..models.gemm import Conv2d, Linear
from ..models.layers import Joined
from . import kohya
from .key import Key
from .read import Entry, Source, read
from .side import Layer, Pair, pair

_SAMPLES = 16  # numbers of each matrix that the fingerprint looks at


@dataclass(frozen=True, eq=False)
class Adapter:
    """parts: component -> layer's name in the network -> its matrices. fingerprint: sixteen hex digits that tell LoRAs
    apart."""

    parts: Mapping[str, Mapping[str, Pair]]
    fingerprint: str


@dataclass(frozen=True)
class Slot:
    """Where a module of diffusers' network is in ours: a layer, or one of ``parts`` that the layer has joined."""

    path: str
    layer: Layer
    part: int = 0
    parts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the module's weight, without the kernel of a 1x1 convolution."""
        if isinstance(self.layer, Conv2d):
            kernel = self.layer.kernel_size
            return (self.layer.out_channels, self.layer.in_channels, *(() if kernel == (1, 1) else kernel))
        return (self.layer.out_features // self.parts, self.layer.in_features)


def slots(network: Model) -> dict[str, Slot]:
    """diffusers' name of every linear and convolution (transformers' without "text_model.") -> its place."""
    found: dict[str, Slot] = {}
    joined: set[str] = set()
    for path, module in network.named_modules():
        if isinstance(module, Joined) and getattr(module, module.joined) is not None:
            whole = getattr(module, module.joined)
            joined.add(f"{path}.{module.joined}")
            for i, leaf in enumerate(module.joins):
                found[f"{path}.{leaf}"] = Slot(f"{path}.{module.joined}", whole, i, len(module.joins))
        elif isinstance(module, (Linear, Conv2d)) and path not in joined:
            found[path] = Slot(path, module)
    return {name.removeprefix("text_model."): slot for name, slot in found.items()}


def load(source: Source, networks: Mapping[str, Model], weight_name: str | None = None,
         network_alphas: Mapping[str, float] | None = None) -> Adapter:
    """Reads a LoRA (see ``read``) for these networks, by component. Its tensors are copied, to the networks' dtypes.

    Raises CheckpointError, naming key and shape, for a file that is damaged or holds something else than LoRA, for a
    layer that the networks do not have, and for matrices that do not fit.
    """
    where, entries = read(source, weight_name, network_alphas)
    places = {component: slots(network) for component, network in networks.items()}
    names = {component: kohya.spellings(component, table, [k.module for k in entries if k[::3] == (component, True)])
             for component, table in places.items()}
    layers: dict[str, dict[str, tuple[Slot, dict[int, Entry]]]] = {}
    for key, entry in entries.items():
        component, module = _find(where, key, entry, places, names)
        slot = places[component][module]
        _check(where, entry, slot)
        _, parts = layers.setdefault(component, {}).setdefault(slot.path, (slot, {}))
        if parts.setdefault(slot.part, entry) is not entry:
            raise CheckpointError(f"{where}: {entry.key!r} and {parts[slot.part].key!r} are for the same layer; keep "
                                  "one of them")
    return Adapter({component: {path: _pair(where, networks[component], *found) for path, found in table.items()}
                    for component, table in layers.items()}, _fingerprint(entries.values()))


def _find(where: str, key: Key, entry: Entry, places: Mapping[str, Mapping[str, Slot]],
          names: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    if key.component is not None and key.component not in places:
        raise CheckpointError(f"{where}: {entry.key!r} is for {key.component}, and there is only {', '.join(places)}; "
                              "it was made for another kind of model")
    for component in places if key.component is None else (key.component,):
        module = key.module.removeprefix("text_model.")
        module = names[component].get(module, "") if key.flat else module
        if module in places[component]:
            return component, module
    raise CheckpointError(f"{where}: {entry.key!r} {tuple(entry.down.shape)} has no place in "
                          f"{key.component or ' or '.join(places)}; it was made for another kind of model")


def _check(where: str, entry: Entry, slot: Slot) -> None:
    """Makes 1x1 convolutions and linears alike, which trainers mix, and compares with the layer."""
    down, up, shape = entry.down, entry.up, slot.shape
    if down.ndim == 4 and down.shape[2:] == (1, 1):
        down = down.flatten(1)
    if up.shape[0] != shape[0] or down.shape[1:] != shape[1:]:
        raise CheckpointError(f"{where}: {entry.key!r} has shape {tuple(entry.down.shape)} and goes with an up matrix "
                              f"{tuple(up.shape)}, the layer's weight is {shape}; it was made for another kind of "
                              "model")
    entry.down, entry.up = down, up.flatten(1)


def _pair(where: str, network: Model, slot: Slot, parts: Mapping[int, Entry]) -> Pair:
    """The matrices of a layer; those of joined ones are below each other, each ``up`` in the rows of its part."""
    dtype, device = network.dtype, network.device
    down = torch.cat([e.down.to(device, dtype) for e in parts.values()])
    if down.ndim == 4:
        down = down.contiguous(memory_format=torch.channels_last)
    each, at = slot.shape[0], 0
    up = torch.zeros(each * slot.parts, len(down), dtype=dtype, device=device)
    for part, e in parts.items():
        rank = len(e.down)
        up[part * each:(part + 1) * each, at:at + rank] = (e.up.to(device, torch.float32) * e.scale).to(dtype)
        at += rank
    if not all(bool(torch.isfinite(m.sum(dtype=torch.float32))) for m in (down, up)):
        key = next(iter(parts.values())).key
        raise CheckpointError(f"{where}: {key!r} or its up matrix holds NaN, infinite numbers, or too large ones for "
                              f"{dtype}; train or convert it again")
    return pair(slot.layer, down, up)


def _fingerprint(entries: Iterable[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in sorted(entries, key=lambda e: e.key):
        digest.update(f"{entry.key} {entry.scale} {tuple(entry.down.shape)};".encode())
        for m in (entry.down, entry.up):
            sample: Tensor = m.flatten()[::max(1, m.numel() // _SAMPLES)]
            digest.update(sample.to(torch.float32).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
