"""``ldmfast convert``: a checkpoint in another layout, dtype or format, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .folder import Folder
from .gguf import GgufFile
from .open_file import open_file
from .parts import Parts
from .single_file import SingleFile
from .single_layout import lay_out
from .weight_file import Stored
from .write import Writer, in_place

DTYPES = {str(d)[6:]: d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
                                  torch.float8_e5m2)}
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".index.json", ".msgpack", ".h5", ".onnx")
_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_CONFIG_NAMES = {"scheduler": "scheduler_config.json"}
_DIFFUSERS = "0.35.0"  # it looks at this before it opens an inpainting folder, to warn of those made before 0.5.1
_NONE = [None, None]

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
Told = Callable[[int], object]


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str], *, dtype: str | None = None,
            variant: str | None = None, prediction_type: str | None = None, progress: bool = True) -> list[str]:
    """Writes ``source`` (a diffusers folder, or a file) as ``target``: a .safetensors file or a diffusers folder.

    dtype: of floating tensors, a name in DTYPES; None keeps each tensor's, and gives float32 for quantised types.
    variant: of a folder, as in Pipeline.from_pretrained. prediction_type: as in Pipeline.from_single_file. A
    file becomes a file under the same names, whatever is in it. Memory: about the largest tensor. The target appears
    under its name only when it is whole. Returns the names of parts that the target's layout has no place for.
    Raises CheckpointError, before anything is written where that can be told.
    """
    source, target = Path(source), Path(target)
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not known; use {', '.join(DTYPES)}")
    wanted = None if dtype is None else DTYPES[dtype]
    if target.suffix in _WEIGHTS and target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: only .safetensors files and folders are written; change the name")
    if not source.exists():
        raise CheckpointError(f"{source}: does not exist")
    if source.is_dir():
        folder = Folder(source, variant)
        if target.suffix == ".safetensors":
            return _folder_to_file(folder, target, wanted, progress)
        return _to_folder(folder, target, wanted, progress)
    if target.suffix == ".safetensors":
        return _file_to_file(source, target, wanted, progress)
    return _to_folder(SingleFile(open_file(source), prediction_type), target, wanted, progress)


def _entries(tensors: Mapping[str, Stored], dtype: torch.dtype | None) -> Entries:
    return {k: (dtype if dtype is not None and t.dtype.is_floating_point else t.dtype, t.shape)
            for k, t in tensors.items()}


@contextmanager
def _bar(entries: list[Entries], what: str, progress: bool) -> Iterator[Told]:
    from ..progress import Bar

    total = sum(prod(shape) * dtype.itemsize for e in entries for dtype, shape in e.values())
    with Bar(total=total, desc=what, unit="B", unit_scale=True, disable=not progress) as bar:
        yield bar.update


def _file_to_file(source: Path, target: Path, dtype: torch.dtype | None, progress: bool) -> list[str]:
    file = open_file(source)
    entries = _entries(file.tensors, dtype)
    metadata = {} if isinstance(file, GgufFile) else {k: v for k, v in file.metadata.items() if k != "format"}
    with (in_place(target) as path, _bar([entries], target.name, progress) as told,
          Writer(path, entries, metadata, told) as writer):
        for name, tensor in file.read(mapped=False):
            writer.write(name, tensor)
            del tensor
    return []


def _folder_to_file(folder: Folder, target: Path, dtype: torch.dtype | None, progress: bool) -> list[str]:
    layout = lay_out(folder)
    entries = _entries(layout.tensors, dtype)
    with (in_place(target) as path, _bar([entries], target.name, progress) as told,
          Writer(path, entries, layout.metadata, told) as writer):
        for name, tensor, piece in layout.read():
            writer.write(name, tensor, piece)
            del tensor
    return layout.left_out


def _to_folder(parts: Parts, target: Path, dtype: torch.dtype | None, progress: bool) -> list[str]:
    entries = {part: _entries(parts.tensors(part), dtype) for part in _with_weights(parts)}
    alone = _alone(parts)
    with in_place(target) as root, _bar(list(entries.values()), target.name, progress) as told:
        root.mkdir()
        for part in parts.names if alone is None else [alone]:
            place = root if alone is not None else root / part
            place.mkdir(exist_ok=True)
            if isinstance(parts, Folder):
                _copy_rest(parts.folder(part), place)
            else:
                _write_config(parts, part, place)
            if part in entries:
                _write_weights(parts, part, place, entries[part], told)
        if alone is None:
            _write_json(root / "model_index.json", _index(parts))
            own = parts.path / "ldmfast.json"
            if own.is_file():
                shutil.copyfile(own, root / own.name)
    return []


def _with_weights(parts: Parts) -> list[str]:
    if isinstance(parts, SingleFile):
        return [n for n in parts.names if parts.sources(n)]
    assert isinstance(parts, Folder)
    return [n for n in parts.names if any(f.name.endswith(_WEIGHTS) for f in parts.folder(n).iterdir())]


def _alone(parts: Parts) -> str | None:
    """The part that is the whole model: a folder of one model, or a file with only a UNet or an autoencoder."""
    networks = [n for n in parts.names if n not in ("scheduler", "tokenizer", "tokenizer_2")]
    return networks[0] if networks in (["model"], ["unet"], ["vae"], ["transformer"]) else None


def _write_weights(parts: Parts, part: str, place: Path, entries: Entries, told: Told) -> None:
    library = parts.index[part][0]
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    with Writer(place / f"{stem}.safetensors", entries, {}, told) as writer:
        for name, tensor in parts.stream(part):
            writer.write(name, tensor)
            del tensor


def _copy_rest(folder: Path, place: Path) -> None:
    """Everything of a part but its weights: configs, tokenizer files."""
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name != "model_index.json":
            shutil.copyfile(file, place / file.name)


def _write_config(parts: Parts, part: str, place: Path) -> None:
    config = parts.config(part)
    if not part.startswith("tokenizer"):
        _write_json(place / _CONFIG_NAMES.get(part, "config.json"), config)
        return
    tokenizer = _ASSETS / "clip_tokenizer"
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(tokenizer / name, place / name)
    own = json.loads((tokenizer / "tokenizer_config.json").read_text())
    _write_json(place / "tokenizer_config.json", own | config)


def _index(parts: Parts) -> dict[str, Any]:
    if isinstance(parts, Folder):
        return parts.index
    index = {**parts.index, "_diffusers_version": _DIFFUSERS}
    name = str(index.get("_class_name"))
    if name == "StableDiffusionXLPipeline" and "text_encoder" not in index:
        index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True,
                  "force_zeros_for_empty_prompt": False}
    xl = "XL" in name
    optional = (["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "image_encoder"] if xl
                else ["safety_checker", "image_encoder"])
    if not xl:
        index["requires_safety_checker"] = False
    return {**{part: _NONE for part in [*optional, "feature_extractor"]}, **index}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
