"""Opens one weight file; its content tells the format, never its name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from . import gguf, safetensors
from .pickles import HOW_TO_CONVERT, PickleFile, is_pickle
from .weight_file import Stored, WeightFile, with_scales


class SafetensorsFile(WeightFile):
    """A .safetensors file. Raises CheckpointError as ``safetensors.read_header`` does."""

    def __init__(self, path: Path):
        self._header = safetensors.read_header(path)
        self.path, self.metadata = path, self._header.metadata
        self.tensors = {}
        for name in sorted(self._header.tensors, key=lambda n: self._header.tensors[n].start):
            entry = self._header.tensors[name]
            dtype = safetensors.DTYPES[entry.dtype]
            self.tensors[name] = Stored(str(dtype).removeprefix("torch."), dtype, entry.shape, entry.nbytes)

    def read(self, names: Iterable[str] | None = None, dtype: torch.dtype | None = None,
             device: torch.device | str = "cpu", *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        wanted = list(self.tensors if names is None else names)
        return safetensors.load(self._header, dtype, device, wanted, mapped=mapped)


def open_file(path: Path) -> WeightFile:
    """safetensors, GGUF, or a PyTorch file that torch's weights-only loader takes.

    A pickle under the name of a format that holds none is refused, whatever is in it. Raises CheckpointError.
    """
    try:
        safetensors.check_regular(path)
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if start.startswith(b"GGUF"):
        return gguf.GgufFile(path)
    pickled = is_pickle(start)
    if pickled is None:
        return with_scales(SafetensorsFile(path))
    if path.suffix in (".safetensors", ".gguf"):
        raise CheckpointError(f"{path}: is not a {path.suffix} file but {pickled}, which could run code when it is "
                              f"loaded elsewhere; convert it {HOW_TO_CONVERT}")
    return PickleFile(path)
