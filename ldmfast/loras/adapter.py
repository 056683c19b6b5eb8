"""An adapter: LoRA matrices put to the layers of the networks they were made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.base import Model
from ..models.gemm import Conv2d, Linear
from ..models.layers import Joined
from . import kohya, original
from .key import DENOISERS, Key
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
        if isinstance(module, Joined):
            for name, leaves in module.groups:
                whole = getattr(module, name)
                if whole is not None:
                    joined.add(f"{path}.{name}")
                    found |= {f"{path}.{n}": Slot(f"{path}.{name}", whole, i, len(leaves))
                              for i, n in enumerate(leaves)}
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
    denoiser = next((c for c in DENOISERS if c in places), None)
    entries = {k._replace(component=denoiser) if k.component == "unet" and denoiser else k: e
               for k, e in entries.items()}
    names = {component: kohya.spellings(component, table, [k.module for k in entries if k[::3] == (component, True)])
             for component, table in places.items()}
    originals = original.names(places["transformer"]) if denoiser == "transformer" else {}
    layers: dict[str, dict[str, tuple[Slot, dict[int, Entry]]]] = {}
    for key, given in entries.items():
        component, modules, swapped = _find(where, key, given, places, names, originals)
        each = [places[component][m] for m in modules]
        for slot, entry in zip(each, _shares(where, given, each, swapped)):
            _check(where, entry, slot)
            _, parts = layers.setdefault(component, {}).setdefault(slot.path, (slot, {}))
            if parts.setdefault(slot.part, entry) is not entry:
                raise CheckpointError(f"{where}: {entry.key!r} and {parts[slot.part].key!r} are for the same layer; "
                                      "keep one of them")
    return Adapter({component: {path: _pair(where, networks[component], *found) for path, found in table.items()}
                    for component, table in layers.items()}, _fingerprint(entries.values()))


def _find(where: str, key: Key, entry: Entry, places: Mapping[str, Mapping[str, Slot]],
          names: Mapping[str, Mapping[str, str]], originals: Mapping[str, original.Target],
          ) -> tuple[str, tuple[str, ...], bool]:
    """Component, its modules, and whether the halves of their outputs are the other way round."""
    if key.component is not None and key.component not in places:
        raise CheckpointError(f"{where}: {entry.key!r} is for {key.component}, and there is only {', '.join(places)}; "
                              "it was made for another kind of model")
    for component in places if key.component is None else (key.component,):
        module = key.module.removeprefix("text_model.")
        module = names[component].get(module, "") if key.flat else module
        if module in places[component]:
            return component, (module,), False
        if component == "transformer" and (found := _original(key, originals)) is not None:
            return component, *found
    raise CheckpointError(f"{where}: {entry.key!r} {tuple(entry.down.shape)} has no place in "
                          f"{key.component or ' or '.join(places)}; it was made for another kind of model")


def _original(key: Key, originals: Mapping[str, original.Target]) -> original.Target | None:
    if key.flat:
        return next((t for name, t in originals.items() if name.replace(".", "_") == key.module), None)
    return originals.get(key.module)


def _shares(where: str, entry: Entry, each: Sequence[Slot], swapped: bool) -> list[Entry]:
    """The LoRA of an original layer as one for each of its modules, which are below each other in it."""
    if len(each) == 1 and not swapped:
        return [entry]
    rows, up = [slot.shape[0] for slot in each], entry.up
    if len(up) != sum(rows):
        raise CheckpointError(f"{where}: {entry.key!r} goes with an up matrix {tuple(up.shape)}, its layers have "
                              f"{' + '.join(map(str, rows))} outputs; it was made for another kind of model")
    up = torch.cat(up.chunk(2)[::-1]) if swapped else up
    return [replace(entry, up=part) for part in up.split(rows)]


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
