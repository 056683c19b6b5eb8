"""PyTorch's own files (.ckpt, .pt, .bin), through torch's weights-only loader alone: nothing in them is executed."""

from __future__ import annotations

import ctypes
import mmap
import pickle
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .weight_file import Stored, WeightFile

HOW_TO_CONVERT = ("where you trust it, in its own program: safetensors.torch.save_file({k: v.contiguous() for k, v in "
                  "model.state_dict().items()}, 'model.safetensors')")
_CONTAINERS = ("state_dict", "model")
# protocols 0 and 1 have no magic: an object begins with a mark, an empty container or the name of a global
_TEXT_PICKLE = re.compile(rb"\((?:[dlti]|[cS(}\]])|[}\]]q|[dl]p\d|c[\w.]+\r?\n[\w.]+\r?\n")
_MADV_DONTNEED = 4
_PIECE = 1 << 20  # elements that are copied at a time


def is_pickle(start: bytes) -> str | None:
    """What kind of pickle a file is, by its first 512 bytes, if it is one."""
    if start.startswith(b"PK\x03\x04"):
        return "a zip archive (a PyTorch pickle?)"
    if len(start) < 3 or start[8:9] == b"{":  # the latter is how safetensors begins, whatever its length is
        return None
    if start[257:262] == b"ustar":
        return "a tar archive (a PyTorch pickle?)"
    binary = start[0] == 0x80 and start[1] in range(1, 6)
    return "a Python pickle" if binary or _TEXT_PICKLE.match(start) else None


class PickleFile(WeightFile):
    """Opening reads names and shapes; a zip file's tensors are mapped, so that their data is read when used.

    Raises CheckpointError when the loader refuses the file, or when it holds no named tensors.
    """

    def __init__(self, path: Path):
        self.path, self.metadata = path, {}
        with path.open("rb") as file:
            self._zipped = file.read(2) == b"PK"
        self.tensors = {k: Stored(str(t.dtype).removeprefix("torch."), t.dtype, tuple(t.shape),
                                  t.numel() * t.element_size()) for k, t in self._load().items()}

    def read(self, names: Iterable[str] | None = None, dtype: torch.dtype | None = None,
             device: torch.device | str = "cpu", *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        tensors = self._load()  # a mapping of its own: nobody else holds pages that are given back below
        for name in list(self.tensors if names is None else names):
            wanted = dtype if dtype is not None and tensors[name].is_floating_point() else tensors[name].dtype
            if mapped:
                yield name, tensors[name].to(device, wanted)
            else:
                yield name, _copied(tensors[name], wanted, self._zipped).to(device)

    def _load(self) -> dict[str, Tensor]:
        try:
            values = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._zipped or None)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError,
                AssertionError, ArithmeticError, MemoryError, RecursionError, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{self.path}: torch's weights-only loader refuses it ({reason[:160]}); convert it "
                                  f"to safetensors {HOW_TO_CONVERT}") from error
        for container in _CONTAINERS:
            if isinstance(values, dict) and isinstance(values.get(container), dict):
                values = values[container]
        if not isinstance(values, dict) or not any(isinstance(v, Tensor) for v in values.values()):
            raise CheckpointError(f"{self.path}: holds no named tensors; not a model's weights")
        found = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        odd = next((k for k, v in found.items() if not isinstance(k, str) or v.layout != torch.strided or v.is_meta
                    or v.is_quantized), None)
        if odd is not None:
            raise CheckpointError(f"{self.path}: tensor {odd!r} is not a plain named tensor; convert it to safetensors "
                                  f"{HOW_TO_CONVERT}")
        return found


def _copied(tensor: Tensor, dtype: torch.dtype, mapped: bool) -> Tensor:
    """A copy, in pieces, each of which is given back to the kernel; mapped pages would stay resident otherwise."""
    if not tensor.is_contiguous():
        return tensor.to(dtype, copy=True)
    out = torch.empty(tensor.shape, dtype=dtype)
    source, target = tensor.view(-1), out.view(-1)
    for first in range(0, source.numel(), _PIECE):
        target[first:first + _PIECE] = source[first:first + _PIECE]
        if mapped:
            _give_back(source[first:first + _PIECE])
    return out


def _give_back(piece: Tensor) -> None:
    if sys.platform != "linux":
        return
    start = piece.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE  # of a file's mapping: a page needed again is read again
    length = piece.data_ptr() + piece.nbytes - start
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)
