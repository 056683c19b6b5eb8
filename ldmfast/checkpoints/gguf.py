"""Reads GGUF files (versions 2 and 3): our own check of the header, the ``gguf`` package's arithmetic of the blocks.

Layout: magic, version, counts of tensors and keys; keys with typed values; names, dimensions (fastest first), types and
offsets of the tensors; padding; data. Rejecting a file costs at most 32 MiB and a second, whatever its header claims:
counts are compared with what the file could hold before anything is read, and long values are passed over.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .weight_file import Stored, WeightFile

MAX_TENSORS = 20_000  # with their entries, as checked here, 12 MB
MAX_KEYS = 10_000
MAX_STRINGS = 1 << 19  # in all lists; a vocabulary has up to 2**18, and each costs a step of a loop here
MAX_TEXT = 4 << 20  # bytes of strings kept in all
_MAX_NAME = 512  # bytes; ggml itself stops at 64, files made from diffusers have up to about 90
_MAX_KEPT = 1 << 16  # bytes; longer strings are passed over
_MAX_ALIGNMENT = 1 << 20
_PIECE = 1 << 18  # elements that are dequantised at a time; the package needs about six times their fp32 size

# number of a type -> its name, elements a block, bytes a block
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
          "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
Info = tuple[tuple[int, ...], int, int]  # dimensions, type, offset
_ORIGINAL = "comfy.gguf.orig_shape."


class GgufFile(WeightFile):
    """metadata: the keys whose values are short, as text. Quantised tensors are read as float32 (or ``dtype``).

    Raises CheckpointError, one line that names the file, when the header is damaged or contradicts the file's size.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                reader = _Reader(file, os.fstat(file.fileno()).st_size)
                try:
                    keys, infos, data = reader.header()
                    self._at = _check(infos, keys, data, reader.size)
                except (ValueError, struct.error) as error:
                    raise CheckpointError(f"{path}: GGUF header is damaged ({error}); fetch the file again") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        self.metadata = {k: str(v) for k, v in keys.items() if not k.startswith(_ORIGINAL)}
        self.tensors = {}
        for name, (dims, kind, _) in infos.items():
            shape = dims[::-1]
            original = keys.get(_ORIGINAL + name)  # ComfyUI flattens a convolution so that blocks fit its rows
            if isinstance(original, list) and all(n >= 0 for n in original) and prod(original) == prod(shape):
                shape = tuple(original)
            name_of, block, size = TYPES[kind]
            self.tensors[name] = Stored(name_of if name_of not in _PLAIN else str(_PLAIN[name_of])[6:],
                                        _PLAIN.get(name_of, torch.float32), shape, prod(dims) // block * size)
        self._types = {name: TYPES[kind] for name, (_, kind, _) in infos.items()}

    def read(self, names: Iterable[str] | None = None, dtype: torch.dtype | None = None,
             device: torch.device | str = "cpu", *, mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Raises CheckpointError before the first tensor when one of them needs the ``gguf`` package and it is not
        installed or cannot read that type."""
        names = list(self.tensors if names is None else names)
        needed = sorted({self._types[n][0] for n in names} - _PLAIN.keys())
        dequantize = _dequantizer(self.path, needed) if needed else None
        with self.path.open("rb") as file:
            empty = os.fstat(file.fileno()).st_size == 0
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if mapped and not empty else None
            for name in names:
                kind, _, _ = self._types[name]
                stored = self.tensors[name]
                converts = dtype is not None and stored.dtype.is_floating_point and dtype != stored.dtype
                if kind in _PLAIN and view is not None and not converts and stored.nbytes:
                    count = stored.nbytes // stored.dtype.itemsize
                    if self._at[name] % stored.dtype.itemsize == 0:
                        tensor = torch.frombuffer(view, dtype=stored.dtype, count=count, offset=self._at[name])
                        yield name, tensor.view(stored.shape).to(device)
                        del tensor
                        continue
                out = dtype if converts else stored.dtype
                yield name, self._copied(name, file, out, dequantize).to(device)

    def _copied(self, name: str, file: BinaryIO, dtype: torch.dtype | None, dequantize: Any) -> Tensor:
        stored, (kind, block, size) = self.tensors[name], self._types[name]
        out = torch.empty(stored.shape, dtype=dtype)
        flat = out.view(-1)
        step = max(_PIECE // block, 1)
        blocks = flat.numel() // block
        file.seek(self._at[name])
        for first in range(0, blocks, step):
            count = min(step, blocks - first)
            raw = np.empty((count, size), np.uint8)
            if file.readinto(raw.data) != raw.size:  # type: ignore[attr-defined]
                raise CheckpointError(f"{self.path}: became shorter while it was read; fetch it again")
            if kind in _PLAIN:
                piece = torch.from_numpy(raw.reshape(-1)).view(stored.dtype)
            else:
                piece = torch.from_numpy(dequantize(raw, kind).reshape(-1))
            flat[first * block:(first + count) * block] = piece
        return out


def _dequantizer(path: Path, kinds: list[str]) -> Any:
    try:
        import gguf
        from gguf import quants
    except ImportError as error:
        raise CheckpointError(f"{path}: holds {', '.join(kinds)} tensors, which the package 'gguf' unpacks; it is not "
                              f"installed ({error}): pip install gguf") from error

    def dequantize(raw: np.ndarray, kind: str) -> np.ndarray:
        with np.errstate(all="ignore"):  # a damaged block gives NaN, which the network's user is told of
            return np.ascontiguousarray(quants.dequantize(raw, gguf.GGMLQuantizationType[kind]), np.float32)

    sizes = {kind: (block, size) for kind, block, size in TYPES.values()}
    for kind in kinds:  # asks the package with one block of zeros
        try:
            values = dequantize(np.zeros((1, sizes[kind][1]), np.uint8), kind)
        except (KeyError, NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{path}: holds {kind} tensors, which the installed package 'gguf' cannot unpack; "
                                  "try 'pip install -U gguf', or use a file of another type") from error
        if values.size != sizes[kind][0]:
            raise CheckpointError(f"{path}: the installed package 'gguf' unpacks a block of {kind} into {values.size} "
                                  f"numbers, the format has {sizes[kind][0]}: pip install -U gguf")
    return dequantize


class _Reader:
    """Numbers and strings of a header; every length is compared with what is left of the file before it is read."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.at = file, size, 0
        self.strings, self.text = MAX_STRINGS, MAX_TEXT

    def number(self, form: str) -> Any:
        width = struct.calcsize(form)
        self.at += width
        return struct.unpack(form, self.file.read(width))[0]

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise ValueError(f"{what} of {count} bytes, {self.size - self.at} are left in the file")
        self.at += count
        self.file.seek(self.at)

    def string(self, what: str, limit: int | None = None) -> str | None:
        """A string, None if it is longer than what is kept; longer than ``limit`` is an error."""
        length = self.number("<Q")
        if length > self.size - self.at:
            raise ValueError(f"{what} of {length} bytes, {self.size - self.at} are left in the file")
        if limit is not None and length > limit:
            raise ValueError(f"{what} of {length} bytes, the limit is {limit}")
        if length > _MAX_KEPT:
            self.skip(length, what)
            return None
        self.at += length
        self.text -= length
        if self.text < 0:
            raise ValueError(f"more than {MAX_TEXT} bytes of strings, the limit")
        return self.file.read(length).decode()

    def value(self, key: str) -> Any:
        kind = self.number("<I")
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise ValueError(f"{key!r} has type {kind}, which is not one of 0 to 12")
        return self.number(_SCALARS[kind])

    def array(self, key: str) -> list[Any] | None:
        """A short list of numbers; None for a long one and for strings, which are passed over."""
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            self.strings -= count
            if self.strings < 0 or 8 * count > self.size - self.at:
                raise ValueError(f"{key!r} has {count} strings; the limit of all is {MAX_STRINGS}, and "
                                 f"{self.size - self.at} bytes are left in the file")
            for _ in range(count):
                self.skip(self.number("<Q"), f"a string of {key!r}")
            return None
        if kind not in _SCALARS:
            raise ValueError(f"{key!r} is a list of type {kind}, which is not a number or a string")
        form = _SCALARS[kind]
        if count <= 16:
            return [self.number(form) for _ in range(count)]
        self.skip(count * struct.calcsize(form), f"the list {key!r}")
        return None

    def header(self) -> tuple[dict[str, Any], dict[str, Info], int]:
        """Keys, tensors (dimensions, type, offset), and where the header ends."""
        if self.file.read(4) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        self.at = 4
        version = self.number("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            raise ValueError(f"version {version}" if swapped not in (2, 3) else f"version {swapped}, big-endian; only "
                             "little-endian files are read")
        tensors, count = self.number("<Q"), self.number("<Q")
        # a key has at least a length, a letter, a type and a byte; a tensor's entry takes 25 bytes without dimensions
        for n, limit, least, what in ((tensors, MAX_TENSORS, 25, "tensors"), (count, MAX_KEYS, 14, "keys")):
            if n > limit or n * least > self.size - self.at:
                raise ValueError(f"{n} {what}; the limit is {limit}, and {self.size - self.at} bytes are left")
        keys: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("a key", _MAX_NAME) or ""
            if not key or key in keys:
                raise ValueError(f"key {key[:80]!r} is empty or given twice")
            value = self.value(key[:80])
            keys[key] = value
        infos: dict[str, Info] = {}
        for _ in range(tensors):
            name = self.string("a name", _MAX_NAME) or ""
            if not name or name in infos:
                raise ValueError(f"tensor {name[:80]!r} is empty or given twice")
            dimensions = self.number("<I")
            if dimensions > 4:
                raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions, the limit is 4")
            dims = tuple(self.number("<Q") for _ in range(dimensions))
            if prod(d or 1 for d in dims) >= 1 << 62:
                raise ValueError(f"tensor {name[:80]!r} has dimensions {list(dims)}, too large")
            infos[name] = (dims, self.number("<I"), self.number("<Q"))
        return keys, infos, self.at


def _check(infos: dict[str, Info], keys: dict[str, Any], end: int, size: int) -> dict[str, int]:
    """Where each tensor's data starts in the file: blocks fit rows, nothing overlaps, nothing ends beyond the file."""
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ValueError(f"general.alignment {alignment!r}, needs a power of two up to {_MAX_ALIGNMENT}")
    data = -(-end // alignment) * alignment
    found: list[tuple[int, int, str]] = []
    for name, (dims, kind, offset) in infos.items():
        where = f"tensor {name[:80]!r}"
        if kind not in TYPES:
            raise ValueError(f"{where} has type {kind}, which is not known; 'pip install -U ldmfast' may help")
        label, block, width = TYPES[kind]
        if (dims[0] if dims else 1) % block:
            raise ValueError(f"{where} has rows of {dims[0] if dims else 1}, {label} has blocks of {block}")
        nbytes = prod(dims) // block * width
        if offset % alignment:
            raise ValueError(f"{where} starts at {offset}, not a multiple of the alignment {alignment}")
        if nbytes and offset + nbytes > size - data:
            raise ValueError(f"{where} ends at byte {offset + nbytes} of the data, the file has {max(size - data, 0)}")
        if nbytes:
            found.append((offset, offset + nbytes, name))
    found.sort()
    for (_, stop, before), (start, _, name) in pairwise(found):
        if start < stop:
            raise ValueError(f"tensor {name[:80]!r} overlaps {before[:80]!r}")
    return {name: min(data + offset, size) for name, (_, _, offset) in infos.items()}  # empty ones may be anywhere
