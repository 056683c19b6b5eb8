"""What every checkpoint layout looks like to a pipeline: named parts with a config and weights."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .weight_file import Stored

_MAX_JSON = 1 << 20  # bytes; the largest real ones, indices of sharded models, have 0.2 MB; parsed it can be 22 times

# names that older diffusers and transformers wrote: pattern, replacement (None: the tensor is not needed)
_OLD_NAMES: tuple[tuple[re.Pattern[str], str | None], ...] = (
    (re.compile(r"(attentions\.\d+)\.query\."), r"\1.to_q."),
    (re.compile(r"(attentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(attentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
    (re.compile(r"embeddings\.position_ids$"), None),
)


class Parts(ABC):
    """An opened checkpoint. Opening reads headers and configs only; weights() reads one part.

    path: the folder or file. index: model_index.json's dictionary, {"_class_name": pipeline, part: [library,
    class], ...}; inferred for a single file.
    """

    path: Path
    index: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """The parts that are there: "unet", "vae", "text_encoder", ..."""
        return [k for k, v in self.index.items() if isinstance(v, list) and len(v) == 2 and v[0] is not None
                and isinstance(v[1], str) and v[1].isidentifier() and k.isprintable()]

    @property
    @abstractmethod
    def files(self) -> list[Path]:
        """All weight files of all parts."""

    def class_name(self, part: str) -> str:
        """Class of a part, as in model_index.json. Raises CheckpointError for a part that is not there."""
        if part not in self.names:
            raise CheckpointError(f"{self.path}: has no part {part!r}; it has "
                                  f"{', '.join(self.names) or 'none'}")
        return self.index[part][1]

    @abstractmethod
    def config(self, part: str) -> dict[str, Any]:
        """The part's configuration (config.json, scheduler_config.json, ...)."""

    @abstractmethod
    def stream(self, part: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", *,
               mapped: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The part's tensors under diffusers' or transformers' names, one after the other in file order: read into
        memory that is free again when the caller lets go, or memory-mapped unless converted."""

    @abstractmethod
    def tensors(self, part: str) -> dict[str, Stored]:
        """How the part's tensors are stored, under the names and in the order of ``stream``; no data is read."""

    def weights(self, part: str, dtype: torch.dtype | None = None,
                device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """All of the part's tensors, memory-mapped unless converted."""
        return dict(self.stream(part, dtype, device, mapped=True))

    def folder(self, part: str) -> Path | None:
        """The part's own folder (a tokenizer is loaded from it), None in a single file."""
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError, naming the file, when it is missing or not one."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes, the limit for JSON is "
                                  f"{_MAX_JSON}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, needs a JSON object")
    return value


def rename_old(name: str) -> str | None:
    """The current name of a tensor, or None for one that is not needed any more."""
    for pattern, replacement in _OLD_NAMES:
        if pattern.search(name):
            return None if replacement is None else pattern.sub(replacement, name)
    return name
