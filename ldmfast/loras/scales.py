"""How strong an adapter is in each part of each network: diffusers' numbers and dictionaries, checked."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import LdmfastError
from .key import COMPONENTS

# a number for the whole network, or (start of a block's name, number), of which the first that fits counts
Scale = float | tuple[tuple[str, float], ...]
Scales = tuple[tuple[str, Scale], ...]  # by component
Choice = tuple[tuple[str, Scales], ...]  # by adapter

_ATTENTIONS = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.")
_BESIDE = re.compile(r"\.(?:resnets|downsamplers|upsamplers)\.")


def scales(adapter: str, weight: Any, components: Mapping[str, Iterable[str]]) -> Scales:
    """weight: a number, or diffusers' dictionary by component, in which a UNet's may be a dictionary again, such as
    ``{"down": 0.5, "mid": 1, "up": {"block_0": 0.2, "block_1": [0.1, 0.2, 0.3]}}``. What is not named has 1.
    components: those that the adapter has, with the names of the networks' layers. Raises LdmfastError; a weight for a
    component that the adapter leaves alone only warns, as in diffusers."""
    if not isinstance(weight, Mapping):
        return tuple((c, _number(adapter, weight)) for c in components)
    _known(adapter, weight, COMPONENTS)
    for name in weight:
        if name not in components:
            warnings.warn(f"the weight of adapter {adapter!r} for {name} changes nothing, as it has only "
                          f"{', '.join(components)}", stacklevel=2)
    return tuple((c, _blocks(adapter, weight[c], names) if isinstance(weight.get(c), Mapping) and c == "unet" else
                  _number(adapter, weight.get(c))) for c, names in components.items())


def at(scale: Scale, layer: str) -> float:
    """The number for a layer, by its name in diffusers' UNet. As in diffusers, a ResNet block (or a
    change of size) has the number of the attention of the same place in its block."""
    if not isinstance(scale, tuple):
        return scale
    beside = layer if layer.startswith("mid_block") else _BESIDE.sub(".attentions.", layer)
    return next(number for start, number in scale if beside.startswith(start))


def times(scale: Scale, factor: float) -> Scale:
    return tuple((start, n * factor) for start, n in scale) if isinstance(scale, tuple) else scale * factor


def as_weight(given: Scales) -> dict[str, Any]:
    """The dictionary that ``scales`` makes ``given`` of."""
    return {component: _as_blocks(s) if isinstance(s, tuple) else s for component, s in given}


def _as_blocks(scale: tuple[tuple[str, float], ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for start, number in scale:
        match = _ATTENTIONS.match(start)
        if match is not None:
            found.setdefault(match[1], {}).setdefault(f"block_{match[2]}", []).append(number)
        elif start:
            found["mid"] = number
    return found


def _number(adapter: str, value: Any) -> float:
    try:
        number = 1.0 if value is None else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise LdmfastError(f"the weight {value!r} of adapter {adapter!r} is not a finite number; give a number, or a "
                           "dictionary by component")
    return number


def _blocks(adapter: str, given: Mapping[str, Any], layers: Iterable[str]) -> Scale:
    places: dict[str, dict[str, int]] = {"down": {}, "up": {}}  # side -> block -> its attentions
    for match in filter(None, map(_ATTENTIONS.match, layers)):
        blocks = places[match[1]]
        blocks[f"block_{match[2]}"] = max(blocks.get(f"block_{match[2]}", 0), int(match[3]) + 1)
    _known(adapter, given, ("down", "mid", "up"))
    found = [("mid_block.attentions.0.", _number(adapter, _one(adapter, given.get("mid"))))]
    for side, blocks in places.items():
        parts = given.get(side)
        if isinstance(parts, Mapping):
            _known(adapter, parts, blocks)
        for block, count in blocks.items():
            value = parts.get(block) if isinstance(parts, Mapping) else parts
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            if len(values) not in (1, count):
                raise LdmfastError(f"adapter {adapter!r}: {len(values)} weights were given for {side}.{block}, which "
                                   f"has {count} attentions; give 1 or {count}")
            at_block = f"{side}_blocks.{block.removeprefix('block_')}.attentions"
            found += [(f"{at_block}.{i}.", _number(adapter, v))
                      for i, v in enumerate(values * (count if len(values) == 1 else 1))]
    return (*found, ("", 1.0))


def _one(adapter: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise LdmfastError(f"adapter {adapter!r}: {len(value)} weights were given for the middle block; give 1")
        return value[0]
    return value


def _known(adapter: str, given: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in given:
        if name not in names:
            raise LdmfastError(f"adapter {adapter!r}: there is no {name!r} to give a weight to; there are "
                               f"{', '.join(names)}")
