"""Diffusers folders: model_index.json, one sub-folder a part, weights whole or sharded, with variants."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .parts import Parts, read_json, read_tensors, rename_old

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = ("safetensors", "bin", "ckpt", "pt")
_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")


class Folder(Parts):
    """A diffusers pipeline folder, or the folder of one model (then its only part is called "model")."""

    def __init__(self, path: str | os.PathLike[str], variant: str | None = None):
        self.path = Path(path)
        self.variant = variant
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: is not a folder; give a diffusers folder, or open a single "
                                  "file "
                                  "with from_single_file")
        if (self.path / "model_index.json").is_file():
            self.index = read_json(self.path / "model_index.json")
        elif (self.path / "config.json").is_file():
            name = read_json(self.path / "config.json").get("_class_name")
            self.index = {"_class_name": None, "model": ["diffusers", name]}
        else:
            raise CheckpointError(f"{self.path}: has no model_index.json; give the folder that "
                                  "save_pretrained wrote")
        if variant is not None:
            self._check_variant(variant)

    def folder(self, part: str) -> Path:
        self.class_name(part)
        if self.index.get("_class_name") is None and part == "model":
            return self.path
        if Path(part).name != part or not (self.path / part).is_dir():
            raise CheckpointError(f"{self.path}: model_index.json names {part!r}, the folder {part}/ is "
                                  "missing")
        return self.path / part

    def config(self, part: str) -> dict[str, Any]:
        folder = self.folder(part)
        for name in _CONFIGS:
            if (folder / name).is_file():
                return read_json(folder / name)
        raise CheckpointError(f"{folder}: has no {_CONFIGS[0]} (or {', '.join(_CONFIGS[1:])})")

    def stream(self, part: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", *,
               mapped: bool = False) -> Iterator[tuple[str, Tensor]]:
        for file in self.part_files(part):
            for name, tensor in read_tensors(file, dtype, device, mapped=mapped):
                current = rename_old(name)
                if current is not None:
                    yield current, tensor

    @property
    def files(self) -> list[Path]:
        found: list[Path] = []
        for part in self.names:
            with contextlib.suppress(CheckpointError):  # tokenizers and schedulers have none
                found += self.part_files(part)
        return found

    def part_files(self, part: str) -> list[Path]:
        """The weight files of a part: one, or its shards. Raises CheckpointError when there are none."""
        folder = self.folder(part)
        for variant in ([self.variant] if self.variant else []) + [None]:
            for ending in _ENDINGS:
                for stem in _STEMS:
                    found = _find(folder, stem, ending, variant)
                    if found:
                        return found
        hint = ", ".join(_variants(folder))
        raise CheckpointError(f"{folder}: has no weights ({_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors)"
                              + (f"; there are variants: {hint}" if hint else ""))

    def _check_variant(self, variant: str) -> None:
        """A part without the variant uses its plain files, as in diffusers; but some part must have it."""
        folders = [self.path] + [self.path / n for n in self.names if (self.path / n).is_dir()]
        there = sorted({v for folder in folders for v in _variants(folder)})
        if variant not in there:
            raise CheckpointError(f"{self.path}: has no variant {variant!r}; "
                                  + (f"it has {', '.join(there)}" if there else "leave variant out"))



def _find(folder: Path, stem: str, ending: str, variant: str | None) -> list[Path]:
    tag = f".{variant}" if variant else ""
    for name in (f"{stem}{tag}.{ending}", f"{stem}.{ending}{tag}"):
        if (folder / name).is_file() and name.endswith(ending):
            return [folder / name]
    for name in (f"{stem}.{ending}.index{tag}.json", f"{stem}{tag}.{ending}.index.json"):
        if (folder / name).is_file():
            return _shards(folder / name)
    return []


def _shards(index: Path) -> list[Path]:
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{index}: has no weight_map; the index is damaged")
    names = list(dict.fromkeys(mapping.values()))
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index}: names a shard {name!r} that is not a file beside it")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name}: shard is missing, {index.name} names it")
    return [index.parent / name for name in names]


def _variants(folder: Path) -> list[str]:
    """Words between stem and ending: diffusion_pytorch_model.fp16.safetensors -> fp16."""
    found = set()
    for file in folder.iterdir():
        words = file.name.split(".")
        if words[0].split("-")[0] in _STEMS:
            middle = words[1:-1]
            # stem.safetensors.index.fp16.json or stem.fp16.....json
            if words[-1] == "json" and len(words) == 5:
                middle = [w for w in words[1:-1] if w not in ("index", *_ENDINGS)]
            elif words[-1] not in _ENDINGS:
                continue
            found |= {w.split("-")[0] for w in middle if w not in ("index", *_ENDINGS, "non_ema")}
    return sorted(found)
