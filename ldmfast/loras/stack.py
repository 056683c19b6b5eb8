"""The adapters of a pipeline: which are loaded, which are at work and how strongly, and the networks with them.

Nothing here is ever changed: every method gives another stack, so a call keeps the one that it began with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..errors import LdmfastError
from ..models.base import Model
from . import scales
from .adapter import Adapter, slots
from .fuse import fused
from .scales import Choice, Scale
from .side import Layer, Pair, with_side
from .twin import twin

Networks = Mapping[str, Model]


@dataclass(frozen=True, eq=False)
class Fused:
    """An adapter in the weights of one component. lora_scale: what its weight was multiplied with."""

    name: str
    component: str
    adapter: Adapter
    scale: Scale
    lora_scale: float


@dataclass(frozen=True, eq=False)
class Stack:
    """base: the networks as loaded, by component. merged: with what is fused. active: adapters of the side path."""

    base: Networks
    merged: Networks
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    active: Choice = ()
    in_weights: tuple[Fused, ...] = ()
    enabled: bool = True

    @classmethod
    def of(cls, networks: Networks) -> Stack:
        return cls(networks, networks)

    @property
    def chosen(self) -> Choice:
        """The adapters of a call that names none."""
        return self.active if self.enabled else ()

    @property
    def active_names(self) -> list[str]:
        return list(dict.fromkeys([*(f.name for f in self.in_weights), *(name for name, _ in self.chosen)]))

    def choice(self, names: str | Sequence[str], weights: Any = None) -> Choice:
        """names with weights as diffusers takes them: None, one for all, or a list with one for each."""
        names = [names] if isinstance(names, str) else list(names)
        each = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(each) != len(names) or len(set(names)) != len(names):
            raise LdmfastError(f"{len(each)} weights were given for the adapters {names}; give one for each, and each "
                               "adapter once")
        found = []
        for name, weight in zip(names, each):
            adapter = self._known(name)
            if any(f.name == name for f in self.in_weights):
                raise LdmfastError(f"adapter {name!r} is fused into the weights; call unfuse_lora() first")
            found.append((name, scales.scales(name, weight, {c: _paths(self.base[c]) for c in adapter.parts})))
        return tuple(found)

    def _known(self, name: str) -> Adapter:
        if name not in self.adapters:
            raise LdmfastError(f"there is no adapter {name!r}; loaded are {', '.join(self.adapters) or 'none'}")
        return self.adapters[name]

    def free_name(self, name: str | None) -> str:
        """The name for a new adapter: the one asked for, or diffusers' default_0 and so on."""
        taken = {*self.adapters, *(f.name for f in self.in_weights)}
        if name is None:
            return next(n for i in range(len(taken) + 1) if (n := f"default_{i}") not in taken)
        if not isinstance(name, str) or not name:
            raise LdmfastError(f"adapter_name={name!r} is not a name; give a text")
        if name in taken:
            raise LdmfastError(f"adapter {name!r} is loaded or fused already; delete_adapters({name!r}) or "
                               "unfuse_lora() first, or take another name")
        return name

    def with_adapter(self, name: str, adapter: Adapter) -> Stack:
        new = replace(self, adapters={**self.adapters, name: adapter})
        return replace(new, active=new.choice(name))

    def without(self, names: str | Iterable[str]) -> Stack:
        gone = {names} if isinstance(names, str) else set(names)
        for name in gone:
            self._known(name)
            if any(f.name == name for f in self.in_weights):
                raise LdmfastError(f"adapter {name!r} is fused into the weights; call unfuse_lora() first")
        return replace(self, adapters={n: a for n, a in self.adapters.items() if n not in gone},
                       active=tuple(c for c in self.active if c[0] not in gone))

    def emptied(self) -> Stack:
        """Without adapters; what is fused stays in the weights, as in diffusers."""
        return replace(self, adapters={}, active=())

    def networks(self, choice: Choice) -> dict[str, Model]:
        """The networks with these adapters on the side path."""
        each = sorted(choice)  # by name: sums in one order, however the choice was written (JSON sorts, too)
        return {c: _with(network, c, [(self.adapters[name], dict(s).get(c, 0.0)) for name, s in each], with_side)
                for c, network in self.merged.items()}

    def fuse(self, components: Collection[str] | None, names: Collection[str] | None, lora_scale: float) -> Stack:
        wanted = self._components(components)
        for name in names or ():
            self._known(name)
        now = [Fused(name, c, self.adapters[name], scale, lora_scale) for name, s in self.active for c, scale in s
               if c in wanted and (names is None or name in names)]
        if not now:
            raise LdmfastError(f"no adapter is active in {', '.join(wanted)} that could be fused; call set_adapters "
                               "first")
        taken = {(f.name, f.component) for f in now}
        rest = ((name, tuple((c, v) for c, v in s if (name, c) not in taken)) for name, s in self.active)
        return self._merge(self.in_weights + tuple(now), tuple((n, s) for n, s in rest if s))

    def unfuse(self, components: Collection[str] | None) -> Stack:
        wanted = self._components(components)
        out = [f for f in self.in_weights if f.component in wanted]
        active = {name: dict(s) for name, s in self.active}
        for f in out:
            if self.adapters.get(f.name) is f.adapter:  # not unloaded meanwhile: it goes on, on the side path
                active.setdefault(f.name, {})[f.component] = f.scale
        return self._merge(tuple(f for f in self.in_weights if f not in out),
                           tuple((name, tuple(s.items())) for name, s in active.items()))

    def _components(self, components: Collection[str] | None) -> list[str]:
        wanted = list(self.base) if components is None else [components] if isinstance(components, str) else components
        for name in wanted:
            if name not in self.base:
                raise LdmfastError(f"there is no component {name!r} to fuse; there are {', '.join(self.base)}")
        return list(wanted)

    def _merge(self, in_weights: tuple[Fused, ...], active: Choice) -> Stack:
        """Always from the base, so that fusing and unfusing never adds up roundings."""
        merged = dict(self.base)
        for c, network in self.base.items():
            adapters = [(f.adapter, scales.times(f.scale, f.lora_scale)) for f in in_weights if f.component == c]
            merged[c] = _with(network, c, adapters, functools.partial(fused, known={}))
        return replace(self, merged=merged, in_weights=in_weights, active=active)


def _paths(network: Model) -> Iterator[str]:
    yield from (slot.path for slot in slots(network).values())  # looked up if asked for: most weights are one number


def _with(network: Model, component: str, adapters: Sequence[tuple[Adapter, Scale]],
          change: Callable[[Layer, list[tuple[Pair, float]]], Layer]) -> Model:
    """The network with the layers that the adapters touch changed, in its variants, too."""
    pairs: dict[str, list[tuple[Pair, float]]] = {}
    for adapter, scale in adapters:
        for path, pair in adapter.parts.get(component, {}).items():
            if weight := scales.at(scale, path):
                pairs.setdefault(path, []).append((pair, weight))
    if not pairs:
        return network
    changed: dict[nn.Module, nn.Module] = {}
    with torch.inference_mode(False), torch.no_grad():
        for path, found in pairs.items():
            for one in (network, *network.variants):
                layer: Any = one.get_submodule(path)
                if layer not in changed:
                    changed[layer] = change(layer, found)
    return twin(network, changed)
