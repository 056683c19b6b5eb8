"""Checks the values of a model's config against its fields: type, range, and how large a network they ask for."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

from ..errors import CheckpointError

MAX_NUMBER = 1 << 20  # channels, sizes, vocabulary entries; the largest real one is 50,000
MAX_LAYERS = 160  # levels times layers times depth; SDXL, the deepest UNet in use, has 60, and 160 build in a second
_LEVELS = 16


def _hints(cls: type) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(cls)
    return {f.name: (hints[f.name], f.default) for f in dataclasses.fields(cls)}


def check_values(config: Any) -> None:
    """config: a dataclass. Raises CheckpointError, naming key and value, for a value of another type than the field's,
    a number that is negative, not finite or above MAX_NUMBER, and for more than MAX_LAYERS layers."""
    for key, (hint, default) in _hints(type(config)).items():
        value = getattr(config, key)
        if not _is(value, hint) or (hint is Any and value is None and default is not None):
            raise CheckpointError(f"config key {key!r} = {repr(value)[:80]} is not {_words(hint)} in range (numbers "
                                  f"up to {MAX_NUMBER}, lists up to {_LEVELS})")
    layers = _total(getattr(config, "layers_per_block", 1))
    depth = max(_total(getattr(config, f"{way}transformer_layers_per_block", 1)) for way in ("", "reverse_"))
    levels = len(getattr(config, "block_out_channels", ()))
    encoders = _total(getattr(config, "num_encoder_blocks", ())) + _total(getattr(config, "num_decoder_blocks", ()))
    flat = sum(_total(getattr(config, key, 0)) for key in ("num_hidden_layers", "num_layers", "num_single_layers"))
    blocks = max(layers * depth * levels, encoders, flat)
    if blocks > MAX_LAYERS:
        raise CheckpointError("config keys 'layers_per_block', 'transformer_layers_per_block', 'num_encoder_blocks', "
                              "'num_hidden_layers', 'num_layers' or 'num_single_layers' ask for "
                              f"{blocks} blocks, the limit is {MAX_LAYERS}")


def _total(value: Any) -> int:
    """The largest number in nested lists."""
    if isinstance(value, (tuple, list)):
        return max((_total(v) for v in value), default=1)
    return value if isinstance(value, int) else 1


def _is(value: Any, hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is(value, h) for h in inside)
    if hint is Any:
        return value is None or _is(value, int) or (
            isinstance(value, tuple) and len(value) <= _LEVELS and all(v is not None and _is(v, Any) for v in value))
    if origin is tuple:
        if not isinstance(value, tuple) or len(value) > _LEVELS:
            return False
        if len(inside) == 2 and inside[1] is Ellipsis:
            return all(_is(v, inside[0]) for v in value)
        return len(value) == len(inside) and all(map(_is, value, inside))
    if hint is type(None):
        return value is None
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value) and abs(value) <= MAX_NUMBER
    if hint is int:
        return type(value) is int and 0 <= value <= MAX_NUMBER
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    return str(getattr(hint, "__name__", hint)).replace("NoneType", "null")
