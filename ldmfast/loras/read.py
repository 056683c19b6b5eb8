"""LoRA files and dictionaries to matrices by component and module; nothing is kept of one that is wrong anywhere."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.open_file import open_file
from ..errors import CheckpointError, LdmfastError
from . import diffusers, kohya, peft
from .key import Key

Source = str | os.PathLike[str] | Mapping[str, Tensor]

_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin",
          "adapter_model.bin")
_LARGEST_CONFIG = 1 << 20  # bytes
# other methods that come in files of the same kind: a mark in the key, and what it is
_OTHERS = (
    (r"\.(?:lora_mid|cp_|hada_t[12]|lokr_t[12])", "a Tucker-decomposed convolution (LoCon)"), (r"\.hada_", "LoHa"),
    (r"\.lokr_", "LoKr"), (r"\.(?:dora_scale|lora_magnitude_vector)", "DoRA"), (r"\.(?:oft_|boft_)", "OFT"),
    (r"\.(?:on_input|ia3_l)", "IA3"), (r"\.(?:a1|a2|b1|b2)\.weight$", "GLoRA"),
    (r"\.diff(?:_b)?$", "a full difference"),
    (r"\.lora_embedding_|\.lora_[AB]\..*embedding", "LoRA of an embedding"),
    (r"\.lora_(?:A|B|up|down)(?:\.\w+)?\.bias$|\.lora\.(?:up|down)\.bias$", "LoRA with biases"),
    (r"\.modules_to_save\.", "a trained module"), (r"^bundle_emb\.|string_to_param", "a textual inversion"))


@dataclass
class Entry:
    """LoRA of one module. down: (r, in) or (r, in, k, k). up: (out, r) or (out, r, 1, 1). key: of down, as given.
    scale: alpha / r."""

    down: Tensor
    up: Tensor
    key: str
    scale: float


@dataclass
class _Found:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def read(source: Source, weight_name: str | None = None, network_alphas: Mapping[str, float] | None = None,
         ) -> tuple[str, dict[Key, Entry]]:
    """What to call the source in messages, and LoRA matrices by key (its role is "down").

    source: a file, a folder (the file in it is weight_name, or has one of the usual names), or a dictionary.
    network_alphas: more alphas, by their keys. Layouts may be mixed. Raises CheckpointError.
    """
    where, items, config = _open(source, weight_name)
    found: dict[Key, _Found] = {}
    for name, tensor in items:
        _put(found, where, name, tensor)
    for name, alpha in (network_alphas or {}).items():
        _put(found, where, name if name.endswith(".alpha") else f"{name}.alpha", torch.tensor(float(alpha)))
    if not found:
        raise CheckpointError(f"{where}: holds no tensor; a LoRA has a down and an up matrix for each layer")
    return where, {key: _entry(where, key, entry, config) for key, entry in found.items()}


def _open(source: Source, weight_name: str | None
          ) -> tuple[str, Iterator[tuple[str, Tensor]], dict[str | None, peft.Config]]:
    if isinstance(source, Mapping):
        return "the LoRA given", iter(source.items()), {}
    if not isinstance(source, (str, os.PathLike)):
        raise LdmfastError(f"a LoRA is given as a {type(source).__name__}; give a file, a folder or a dictionary of "
                           "tensors")
    path = Path(source)
    if path.is_dir():
        names = [weight_name] if weight_name is not None else [n for n in _FILES if (path / n).is_file()]
        if not names:
            raise CheckpointError(f"{path}: has none of {', '.join(_FILES)}; name the file with weight_name=")
        path = path / names[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; nothing is downloaded, give a local file or folder")
    file, where = open_file(path), str(path)
    config = path.with_name(peft.CONFIG_FILE)
    text = file.metadata.get(peft.METADATA)
    if text is None and config.is_file() and path.name.startswith("adapter_model"):
        if config.stat().st_size > _LARGEST_CONFIG:
            raise CheckpointError(f"{config}: has {config.stat().st_size} bytes, at most {_LARGEST_CONFIG} are read")
        text, where = config.read_text(errors="replace"), str(config)
    # a copy of what is in the file, which a trainer may write again while the pipeline is open
    return str(path), iter(file.read(mapped=False)), {} if text is None else peft.configs(text, where)


def _put(found: dict[Key, _Found], where: str, name: str, tensor: Tensor) -> None:
    key = kohya.parse(name) or peft.parse(name) or (diffusers.parse(name) if isinstance(name, str) else None)
    other = next((what for mark, what in _OTHERS if re.search(mark, name)), None)
    if key is None or other is not None:
        what = other or "a tensor of no layout known (kohya's, diffusers', peft's)"
        raise CheckpointError(f"{where}: {name!r} is {what}, which is not supported; convert it to plain LoRA, or "
                              "merge it into the model")
    if not isinstance(tensor, Tensor) or (not tensor.is_floating_point() and key.role != "alpha"):
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CheckpointError(f"{where}: {name!r} is {kind}, needs a floating tensor; save the LoRA as fp16 or fp32")
    entry = found.setdefault(key._replace(role="down"), _Found())
    if key.role in entry.tensors:
        raise CheckpointError(f"{where}: {name!r} and {entry.keys[key.role]!r} are the same matrix of one layer; keep "
                              "one of them")
    entry.tensors[key.role], entry.keys[key.role] = tensor, name


def _entry(where: str, key: Key, found: _Found, config: Mapping[str | None, peft.Config]) -> Entry:
    for role in ("down", "up"):
        if role not in found.tensors:
            given = next(iter(found.keys.values()))
            raise CheckpointError(f"{where}: {given!r} is without the {role} matrix of its layer; the file is not "
                                  "whole, get it again")
    down, up = found.tensors["down"], found.tensors["up"]
    shaped = down.ndim in (2, 4) and (up.ndim == 2 or (up.ndim == 4 and up.shape[2:] == (1, 1)))
    if not shaped or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise CheckpointError(f"{where}: {found.keys['down']!r} {tuple(down.shape)} and {found.keys['up']!r} "
                              f"{tuple(up.shape)} do not make a product of one rank; the file is damaged, get it again")
    return Entry(down, up, found.keys["down"], _scale(where, key, found, config))


def _scale(where: str, key: Key, found: _Found, config: Mapping[str | None, peft.Config]) -> float:
    rank = found.tensors["down"].shape[0]
    alpha = found.tensors.get("alpha")
    if alpha is None:
        settings = config.get(key.component, config.get(None))
        return 1.0 if settings is None else settings.scale(key.module, rank)
    value = float(alpha) if alpha.numel() == 1 else math.nan
    if not math.isfinite(value):
        raise CheckpointError(f"{where}: {found.keys['alpha']!r} of shape {tuple(alpha.shape)} is not one finite "
                              "number; write the LoRA's alpha there, or leave it out")
    return value / rank
