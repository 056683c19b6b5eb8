"""Diffusers folders: model_index.json, one sub-folder a part, weights whole or sharded, with variants."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .open_file import open_file
from .parts import Parts, read_json, rename_old
from .weight_file import Stored, WeightFile

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_ENDINGS = ("safetensors", "bin", "ckpt", "pt")
_SHIPPED = Path(__file__).resolve().parent.parent / "assets"
_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")


class Folder(Parts):
    """A diffusers pipeline folder, or the folder of one model (then its only part is called "model").

    The folders that ship with ldmfast share files, by links in a checkout. A wheel cannot hold links, so there the
    files are missing and shared.json beside model_index.json says in which shipped folder a part's are. Others' folders
    have no such say.
    """

    def __init__(self, path: str | os.PathLike[str], variant: str | None = None):
        self.path = Path(path)
        self.variant = variant
        if not os.path.exists(self.path):
            raise CheckpointError(f"{self.path}: does not exist; give a diffusers folder or a weights file")
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: is not a folder; give a diffusers folder, or open a single file with "
                                  "from_single_file")
        if (self.path / "model_index.json").is_file():
            self.index = read_json(self.path / "model_index.json")
        elif (self.path / "config.json").is_file():
            name = read_json(self.path / "config.json").get("_class_name")
            self.index = {"_class_name": None, "model": ["diffusers", str(name)]}
        else:
            raise CheckpointError(f"{self.path}: has no model_index.json; give the folder that "
                                  "save_pretrained wrote")
        self.shared: dict[str, Path] = {}
        if self.path.resolve().parent == _SHIPPED and (self.path / "shared.json").is_file():
            self.shared = {part: _SHIPPED / name for part, name in read_json(self.path / "shared.json").items()}
        if variant is not None:
            self._check_variant(variant)

    def folder(self, part: str) -> Path:
        self.class_name(part)
        if self.index.get("_class_name") is None and part == "model":
            return self.path
        if part in self.shared and not os.path.isdir(self.path / part):
            return self.shared[part]
        if Path(part).name != part or part == ".." or not os.path.isdir(self.path / part):
            raise CheckpointError(f"{self.path}: model_index.json names {part[:80]!r}, the folder {part[:80]}/ is "
                                  "missing")
        return self.path / part

    def config(self, part: str) -> dict[str, Any]:
        folder = self.folder(part)
        for name in _CONFIGS:
            if os.path.isfile(folder / name):
                config = read_json(folder / name)
                cls = config.get("_class_name")
                if cls is not None and not (isinstance(cls, str) and cls.isidentifier()):
                    raise CheckpointError(f"{folder / name}: _class_name {str(cls)[:80]!r} is not the name of a class")
                return config
        raise CheckpointError(f"{folder}: has no {_CONFIGS[0]} (or {', '.join(_CONFIGS[1:])})")

    def stream(self, part: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", *,
               mapped: bool = False) -> Iterator[tuple[str, Tensor]]:
        for file in self.open_part(part):
            for name, tensor in file.read(None, dtype, device, mapped=mapped):
                current = rename_old(name)
                if current is not None:
                    yield current, tensor
                del tensor  # before the next one is read

    def tensors(self, part: str) -> dict[str, Stored]:
        renamed = ((rename_old(k), v) for file in self.open_part(part) for k, v in file.tensors.items())
        return {k: v for k, v in renamed if k is not None}

    def open_part(self, part: str) -> list[WeightFile]:
        """The part's weight files, checked against each other. Raises CheckpointError when a tensor is in two shards,
        or not in the shard that the index names."""
        paths, index = self._found(part)
        files = [open_file(path) for path in paths]
        owner: dict[str, Path] = {}
        for file in files:
            twice = next((k for k in file.tensors if k in owner), None)
            if twice is not None:
                raise CheckpointError(f"{file.path}: tensor {twice!r} is in {owner[twice].name}, too; the shards are "
                                      "of different models, fetch them again")
            owner.update(dict.fromkeys(file.tensors, file.path))
        hidden = {name for file in files for name in file.hidden}
        for name, shard in ({} if index is None else _weight_map(index)).items():
            there = owner.get(name)
            if name not in hidden and (there is None or there.name != shard):
                raise CheckpointError(f"{index}: says that tensor {name[:80]!r} is in {shard}, it is "
                                      f"{f'in {there.name}' if there else 'in no shard'}; fetch the model again")
        return files

    @property
    def files(self) -> list[Path]:
        found: list[Path] = []
        for part in self.names:
            with contextlib.suppress(CheckpointError):  # tokenizers and schedulers have none
                found += self.part_files(part)
        return found

    def part_files(self, part: str) -> list[Path]:
        """The weight files of a part: one, or its shards. Raises CheckpointError when there are none."""
        return self._found(part)[0]

    def _found(self, part: str) -> tuple[list[Path], Path | None]:
        """The part's weight files, and the index that names them if they are shards."""
        folder = self.folder(part)
        variants = ([self.variant] if self.variant else []) + [None]
        for place in (folder, *([self.shared[part]] if part in self.shared else [])):
            for variant, ending, stem in itertools.product(variants, _ENDINGS, _STEMS):
                found = _find(place, stem, ending, variant)
                if found is not None:
                    return found
        hint = ", ".join(_variants(folder))
        raise CheckpointError(f"{folder}: has no weights ({_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors)"
                              + (f"; there are variants: {hint}" if hint else ""))

    def _check_variant(self, variant: str) -> None:
        """A part without the variant uses its plain files, as in diffusers; but some part must have it."""
        folders = [self.path, *(self.path / n for n in self.names if os.path.isdir(self.path / n))]
        there = sorted({v for folder in folders for v in _variants(folder)})
        if variant not in there:
            raise CheckpointError(f"{self.path}: has no variant {variant!r}; "
                                  + (f"it has {', '.join(there)}" if there else "leave variant out"))


def _find(folder: Path, stem: str, ending: str, variant: str | None) -> tuple[list[Path], Path | None] | None:
    tag = f".{variant}" if variant else ""
    for name in (f"{stem}{tag}.{ending}", f"{stem}.{ending}{tag}"):
        if os.path.isfile(folder / name) and name.endswith(ending):
            return [folder / name], None
    for name in (f"{stem}.{ending}.index{tag}.json", f"{stem}{tag}.{ending}.index.json"):
        if os.path.isfile(folder / name):
            shards = dict.fromkeys(_weight_map(folder / name).values())
            return [folder / shard for shard in shards], folder / name
    return None


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file beside the index. Raises CheckpointError for a name that leads elsewhere or to no file."""
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{index}: has no weight_map; the index is damaged")
    good: set[str] = set()
    for name in mapping.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or (
                not name.isprintable()):
            raise CheckpointError(f"{index}: names a shard {str(name)[:80]!r} that is not a file beside it")
        if name not in good and not os.path.isfile(index.parent / name):
            raise CheckpointError(f"{index.parent / name[:80]}: shard is missing, {index.name} names it")
        good.add(name)
    return mapping


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
