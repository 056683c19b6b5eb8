"""Writes .safetensors files tensor by tensor, and puts files and folders in place only when they are whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .safetensors import DTYPES, MAX_HEADER

_PIECE = 1 << 20  # elements that are converted at a time
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NO_PROCESS = 1 << 32  # added to a process id, gives one that no system has
_NARROW = (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)  # float32's and bfloat16's numbers may not fit


@contextlib.contextmanager
def in_place(target: Path, over: bool = False) -> Iterator[Path]:
    """A path beside ``target`` to write a file or folder at; it gets the name ``target`` when the block ends well.

    over: a file of that name is replaced. Whatever ends the process before that leaves at most ``.<name>.<pid>.part``,
    which the next write of the same target removes. Raises CheckpointError when target exists (unless ``over``), or
    cannot be written.
    """
    if not over and os.path.lexists(target):
        raise CheckpointError(f"{target}: exists already; remove it, or give another name")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target}: folder {target.parent} does not exist; create it")
    _remove_leftovers(target)
    part = _part(target, os.getpid())
    try:
        yield part
        (os.replace if over else os.rename)(part, target)
        with contextlib.suppress(OSError):  # not every file system lets a folder be synchronised
            _synchronise(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        _remove(part)


def _part(target: Path, pid: int) -> Path:
    return target.with_name(f".{target.name}.{pid}.part")


def _remove(part: Path) -> None:
    if part.is_dir() and not part.is_symlink():
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Removes what processes that are no more left of earlier writes of the same target."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.([0-9]+)\.part")
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder that can be written to, but not listed
        names = os.listdir(target.parent)
    for name in names:
        found = pattern.fullmatch(name)
        if found is None or _lives(int(found[1])):
            continue
        # The id may be of a process of another machine that shares this disk: without its name, that one fails when it
        # is done, whereas a folder emptied under its hands would be put in place.
        gone = _part(target, int(found[1]) + _NO_PROCESS)
        with contextlib.suppress(OSError):  # another user's, or removed by somebody else meanwhile
            os.rename(target.with_name(name), gone)
            _remove(gone)


def _lives(pid: int) -> bool:
    """Whether there is such a process, or may be: on Windows, asking would be sending it a signal."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Writer:
    """One new file of the given tensors, which may come in any order and each in several pieces of its rows.

    entries: name -> (dtype in the file, shape). As in safetensors' own writer, dtypes with long elements come first, so
    that all are aligned. told: is called with the number of bytes after each piece.
    """

    def __init__(self, path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
                 metadata: Mapping[str, str], told: Callable[[int], object] | None = None):
        self._told = told or (lambda n: None)
        self._dtypes = {name: dtype for name, (dtype, _) in entries.items()}
        self._starts: dict[str, int] = {}
        self._left = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in entries.items()}
        header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        end = 0
        for name in sorted(entries, key=lambda n: -self._dtypes[n].itemsize):
            dtype, shape = entries[name]
            if dtype not in _NAMES:
                raise CheckpointError(f"tensor {name!r} has dtype {dtype}, which safetensors files do not hold")
            stop = end + self._left[name]
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, stop]}
            self._starts[name], end = end, stop
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MAX_HEADER:
            raise CheckpointError(f"{len(entries)} tensors need a header of {len(text)} bytes, the limit is "
                                  f"{MAX_HEADER}")
        self._data = 8 + len(text)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data + end)

    def write(self, name: str, tensor: Tensor, piece: int = 0) -> None:
        """The tensor, or its ``piece``-th equal part of the rows. Raises CheckpointError when a number that is finite
        is not in the file's dtype."""
        dtype = self._dtypes[name]
        flat = tensor.detach().reshape(-1)
        at = self._starts[name] + piece * flat.numel() * dtype.itemsize
        self._left[name] -= flat.numel() * dtype.itemsize
        self._file.seek(self._data + at)
        for first in range(0, flat.numel(), _PIECE):
            part = flat[first:first + _PIECE].contiguous()
            if part.dtype != dtype:
                _check_fits(name, part, dtype)
                part = part.to(dtype)
            self._file.write(part.view(torch.uint8).numpy().data)
            self._told(part.nbytes)

    def close(self) -> None:
        """Raises CheckpointError when a tensor has not come, or not whole."""
        missing = next((n for n, left in self._left.items() if left), None)
        if missing is not None:
            raise CheckpointError(f"tensor {missing!r} was not read whole: {self._left[missing]} bytes are missing")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file:
            if kind is None:
                self.close()


def _check_fits(name: str, numbers: Tensor, dtype: torch.dtype) -> None:
    if dtype in _NARROW and numbers.is_floating_point():
        largest = numbers.float().abs().nan_to_num(posinf=0).max().item()
        if largest > torch.finfo(dtype).max:
            raise CheckpointError(f"tensor {name!r} has numbers up to {largest:.4g}, {str(dtype)[6:]} ends at "
                                  f"{torch.finfo(dtype).max:.4g}; use bfloat16")
