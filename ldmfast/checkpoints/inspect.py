"""What a checkpoint is, told from headers and configs alone: kind, parts, tensor counts, sizes, dtypes."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..errors import CheckpointError
from .folder import Folder
from .open_file import open_file
from .parts import Parts
from .single_file import SingleFile
from .weight_file import Stored

# (some tensor's name contains this) -> what the file is, for files that hold no part of a pipeline
_OTHER = (
    ("lora_unet_", "LoRA (kohya layout)"), (".lora_A.", "LoRA (peft layout)"),
    (".lora.down.", "LoRA (diffusers layout)"), ("control_model.", "ControlNet (CompVis layout)"),
    ("controlnet_cond_embedding.", "ControlNet (diffusers layout)"),
    ("down_blocks.", "a diffusers model of a kind that single files do not hold"),
    ("double_blocks.", "Flux transformer"), ("joint_blocks.", "SD 3 transformer"),
)


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class PartReport:
    """One part. dtypes: stored dtype -> number of tensors."""

    name: str
    kind: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What ``inspect`` found. str() gives lines for a terminal."""

    path: Path
    kind: str
    parts: tuple[PartReport, ...]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}, {_size(self.nbytes)}"]
        for p in self.parts:
            dtypes = ", ".join(f"{k} {n}" if len(p.dtypes) > 1 else k for k, n in sorted(p.dtypes.items()))
            numbers = f"{p.tensors:>5} tensors {p.parameters / 1e6:>9.2f} M {_size(p.nbytes):>10}  {dtypes}"
            lines.append(f"  {p.name:<16} {p.kind:<28} {numbers if p.tensors else ''}".rstrip())
        lines += [f"  {k}: {v[:80]}" for k, v in sorted(self.metadata.items()) if v]
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str]) -> Report:
    """Reads headers and configs of a folder or file, no weights (a .ckpt is read by torch's weights-only loader).

    Raises CheckpointError for a path that is missing, damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist")
    return _folder(Folder(path)) if path.is_dir() else _file(path)


def _folder(parts: Folder) -> Report:
    found = []
    for part in parts.names:
        try:
            parts.part_files(part)
        except CheckpointError:
            tensors = []  # tokenizers and schedulers have no weights
        else:
            tensors = _tensors({k: t for file in parts.open_part(part) for k, t in file.tensors.items()})
        found.append(_report(part, parts.class_name(part) or "?", tensors))
    kind = parts.index.get("_class_name")
    return Report(parts.path, f"diffusers folder, {kind}" if kind else "folder of one diffusers model",
                  tuple(found), {})


def _file(path: Path) -> Report:
    file = open_file(path)
    tensors, metadata = _tensors(file.tensors), file.metadata
    try:
        parts = SingleFile(file)
    except CheckpointError:
        kind = next((kind for mark, kind in _OTHER if any(mark in t.name for t in tensors)), "unknown model")
        return Report(path, kind, (_report("(all tensors)", "", tensors),), metadata)
    return Report(path, _describe(parts), tuple(_single(parts, tensors)), metadata)


def _single(parts: SingleFile, tensors: list[_Tensor]) -> list[PartReport]:
    found, used = [], set()
    for part in parts.names:
        sources = parts.sources(part)
        used |= sources
        found.append(_report(part, parts.class_name(part), [t for t in tensors if t.name in sources]))
    rest = [t for t in tensors if t.name not in used]
    return found + ([_report("(unused)", "", rest)] if rest else [])


def _describe(parts: Parts) -> str:
    if "transformer" in parts.names:
        return f"{parts.class_name('transformer').removesuffix('Transformer2DModel')} in its original layout"
    if "unet" not in parts.names:
        return f"CompVis-layout file with {' and '.join(parts.names)}"
    unet = parts.config("unet")
    family = ("SDXL" if "addition_embed_type" in unet else "SD 2" if unet["use_linear_projection"] else "SD 1")
    if family == "SDXL" and "text_encoder" not in parts.names and "text_encoder_2" in parts.names:
        family = "SDXL refiner"
    use = {9: ", inpainting", 8: ", instruct-pix2pix"}.get(unet["in_channels"], "")
    return f"CompVis-layout file, {family}{use}, predicts {parts.config('scheduler')['prediction_type']}"


def _tensors(tensors: dict[str, Stored]) -> list[_Tensor]:
    return [_Tensor(k, t.kind, t.shape, t.nbytes) for k, t in tensors.items()]


def _report(name: str, kind: str, tensors: list[_Tensor]) -> PartReport:
    return PartReport(name, kind, len(tensors), sum(prod(t.shape) for t in tensors),
                      sum(t.nbytes for t in tensors), dict(Counter(t.dtype for t in tensors)))


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.4g} {unit}"
        n /= 1000
    return f"{n:.2f} GB"
