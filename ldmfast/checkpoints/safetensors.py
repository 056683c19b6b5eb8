"""Reads .safetensors files: the header is parsed as a stream and checked before a byte of data is believed.

Layout: 8 bytes little-endian header length, JSON header, data. Rejecting a file costs at most 32 MiB,
whatever its header claims: the text is read in blocks, an entry may have 64 KiB, the metadata 4 MiB, a file
50,000 tensors.
"""

from __future__ import annotations

import codecs
import json
import mmap
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CheckpointError
from .pickles import is_pickle

MAX_HEADER = 100_000_000  # bytes, the format's own limit
MAX_TENSORS = 50_000  # ten times the largest diffusion model in use; an entry costs about 0.5 KB here
MAX_METADATA = 4 << 20  # characters in all; trainers store tag lists of up to about 1 MB
_MAX_ENTRY = 1 << 16  # characters of one name or one tensor's entry; a real one has below 300
_BLOCK = 1 << 17
_PIECE = 4 << 20  # bytes of a tensor that are read at a time
_SPACE = re.compile(r"[ \t\r\n]*")

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}
_DECODER = json.JSONDecoder(object_pairs_hook=lambda pairs: _unique(pairs))


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. start, stop: bytes, counted from the start of the data."""

    __slots__ = ("dtype", "shape", "start", "stop")
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A header that has been checked against the file. data: offset of the first data byte."""

    path: Path
    tensors: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    data: int = 0


def check_regular(path: Path) -> None:
    """Raises CheckpointError for a pipe, a socket or a device: to open one may wait for ever, to read it never ends."""
    if not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)):
        raise CheckpointError(f"{path}: is a pipe, a socket or a device; give a file on a disk")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks the header of a .safetensors file; no tensor data is read.

    Raises CheckpointError, one line that names the file, when it is missing, not this format (a renamed
    pickle, a web page, a Git LFS pointer), truncated, or when names, dtypes, shapes and offsets contradict
    each other.
    """
    path = Path(path)
    try:
        check_regular(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file, size)
            try:
                tensors, metadata = _Parser(file, length).header()
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path}: header is not UTF-8; the file is damaged") from error
            except (ValueError, RecursionError) as error:
                raise CheckpointError(f"{path}: header is damaged ({error}); fetch the file again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    _check_offsets(path, tensors, size - 8 - length)
    return Header(path, tensors, metadata, 8 + length)


def load(path: str | os.PathLike[str] | Header, dtype: torch.dtype | None = None,
         device: torch.device | str = "cpu", names: Iterator[str] | list[str] | None = None, *,
         mapped: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, tensor) in file order, or for the given names.

    Tensors that keep their dtype are memory-mapped (copy on write): nothing is read before it is used, and
    the file must not be overwritten in place meanwhile. mapped False: they are read, one at a time; for a caller
    that lets go of each before the next, since pages of a mapping would stay. dtype: floating tensors are
    converted, one at a time.
    Raises CheckpointError as read_header does.
    """
    header = path if isinstance(path, Header) else read_header(path)
    wanted = sorted(header.tensors, key=lambda n: header.tensors[n].start) if names is None else names
    with header.path.open("rb") as file:
        empty = os.fstat(file.fileno()).st_size == header.data
        view = None if empty or not mapped else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name in wanted:
            yield name, _tensor(header, header.tensors[name], file, view, dtype).to(device)


def _tensor(header: Header, entry: Entry, file: BinaryIO, mapped: mmap.mmap | None,
            dtype: torch.dtype | None) -> Tensor:
    stored = DTYPES[entry.dtype]
    converts = dtype is not None and stored.is_floating_point and dtype != stored
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=dtype if converts else stored)
    start = header.data + entry.start
    if mapped is not None and not converts and start % stored.itemsize == 0:
        count = entry.nbytes // stored.itemsize
        return torch.frombuffer(mapped, dtype=stored, count=count, offset=start).view(entry.shape)
    # read, not mapped: the pages would stay resident; in pieces, so that no second copy of a large tensor is there
    out = torch.empty(entry.shape, dtype=dtype if converts else stored)
    flat, piece = out.view(-1), torch.empty(min(entry.nbytes, _PIECE), dtype=torch.uint8)
    file.seek(start)
    for at in range(0, entry.nbytes, _PIECE):
        raw = piece[:min(_PIECE, entry.nbytes - at)]
        if file.readinto(raw.numpy()) != len(raw):  # type: ignore[attr-defined]
            raise CheckpointError(f"{header.path}: became shorter while it was read; fetch it again")
        flat[at // stored.itemsize:(at + len(raw)) // stored.itemsize] = raw.view(stored)
    return out


_OTHER_KINDS = (
    (b"GGUF", "a GGUF file"), (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data: run git lfs pull"),
    (b"<!DOCTYPE", "a web page"), (b"<html", "a web page"), (b"<?xml", "a web page"),
)


def _header_length(path: Path, file: BinaryIO, size: int) -> int:
    start = file.read(512)
    kind = next((k for magic, k in _OTHER_KINDS if start.startswith(magic)), None) or is_pickle(start)
    if kind is not None:
        raise CheckpointError(f"{path}: not a safetensors file but {kind}")
    if len(start) < 10:
        raise CheckpointError(f"{path}: has {size} bytes, too few for a safetensors file; fetch it again")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path}: claims a header of {length} bytes, the limit is {MAX_HEADER}; not a "
                              "safetensors file, or damaged")
    if length > size - 8 or length < 2:
        raise CheckpointError(f"{path}: claims a header of {length} bytes, the file has {size - 8} after "
                              "the length; "
                              "truncated or damaged, fetch it again")
    if start[8:9] != b"{":
        raise CheckpointError(f"{path}: header does not start with '{{'; not a safetensors file, or damaged")
    file.seek(8)
    return length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


class _Parser:
    """A pull parser for the header: never more than a block and one entry in memory, besides what is
    returned."""

    def __init__(self, file: BinaryIO, length: int):
        self.file, self.left = file, length
        self.decode = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at = "", 0

    def fill(self, wanted: int) -> None:
        """Makes ``wanted`` characters available, unless the header ends before."""
        while self.left and len(self.text) - self.at < wanted:
            block = self.file.read(min(_BLOCK, self.left))
            if not block:
                raise ValueError("it ends early")
            self.left -= len(block)
            self.text, self.at = self.text[self.at:] + self.decode.decode(block, final=not self.left), 0

    def peek(self) -> str:
        """The next character that is not a space, "" at the end."""
        while True:
            self.fill(1)
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.left:
                return self.text[self.at:self.at + 1]

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"expected {character!r}, found {self.peek()[:1]!r}")
        self.at += 1

    def value(self, limit: int = _MAX_ENTRY) -> Any:
        """One JSON value of at most ``limit`` characters."""
        self.peek()
        window = _MAX_ENTRY
        while True:
            self.fill(min(window, limit))
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except ValueError:
                if window >= limit or not self.left:
                    raise
                window *= 4  # a long string may have been cut
                continue
            if end - self.at > limit:
                raise ValueError(f"a value of {end - self.at} characters, the limit is {limit}")
            self.at = end
            return value

    def items(self) -> Iterator[str]:
        """Keys of an object; the caller reads each value before going on."""
        self.take("{")
        while self.peek() != "}":
            key = self.value()
            if not isinstance(key, str):
                raise ValueError("a name is not a string")
            self.take(":")
            yield key
            if self.peek() != "}":
                self.take(",")
                if self.peek() == "}":
                    raise ValueError("a comma before '}'")
        self.at += 1

    def header(self) -> tuple[dict[str, Entry], dict[str, str]]:
        tensors: dict[str, Entry] = {}
        metadata: dict[str, str] = {}
        seen = False
        for name in self.items():
            if name == "__metadata__":
                if seen:
                    raise ValueError("__metadata__ is given twice")
                metadata, seen = self.metadata(), True
                continue
            if name in tensors:
                raise ValueError(f"tensor {name[:80]!r} is given twice")
            tensors[name] = _entry(name, self.value())
            if len(tensors) > MAX_TENSORS:
                raise ValueError(f"more than {MAX_TENSORS} tensors, the limit")
        if self.peek() or self.left:
            raise ValueError("text after its end")
        return tensors, metadata

    def metadata(self) -> dict[str, str]:
        found: dict[str, str] = {}
        room = MAX_METADATA
        for key in self.items():
            value = self.value(max(room, 2))
            if not isinstance(value, str) or key in found:
                raise ValueError(f"metadata {key[:80]!r} is not one string")
            room -= len(key) + len(value)
            if room < 0:
                raise ValueError(f"more than {MAX_METADATA} characters of metadata, the limit")
            found[key] = value
        return found


def _entry(name: str, value: Any) -> Entry:
    where = f"tensor {name[:80]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has dtype {str(dtype)[:20]!r}, which is not one of {' '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError(f"{where} has a shape or offset that is not a whole number >= 0")
    if len(shape) > 16 or len(offsets) != 2:
        raise ValueError(f"{where} has {len(shape)} dimensions (limit 16) and {len(offsets)} offsets (2 "
                         "needed)")
    size = DTYPES[dtype].itemsize * prod(shape)
    if size != offsets[1] - offsets[0]:
        raise ValueError(f"{where}, {dtype} {shape}, needs {size} bytes and has {offsets[1] - offsets[0]}")
    if not size and prod(n or 1 for n in shape) >= 1 << 62:  # torch multiplies the sizes of an empty tensor, too
        raise ValueError(f"{where} has shape {shape}, too large")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_offsets(path: Path, tensors: dict[str, Entry], size: int) -> None:
    """Tensors must cover the data exactly: no overlap, no hole, nothing beyond the end of the file."""
    end, before = 0, "the start"
    for name in sorted(tensors, key=lambda n: (tensors[n].start, tensors[n].stop)):
        entry = tensors[name]
        if entry.stop > size:
            raise CheckpointError(f"{path}: tensor {name[:80]!r} ends at byte {entry.stop} of the data, the "
                                  "file has "
                                  f"{size}; truncated, fetch it again")
        if entry.start != end:
            what = "overlaps" if entry.start < end else "leaves a hole after"
            raise CheckpointError(f"{path}: tensor {name[:80]!r} {what} {before[:80]!r}; the file is damaged")
        end, before = entry.stop, name
    if end != size:
        raise CheckpointError(f"{path}: tensors end at byte {end} of the data, the file has {size}; the "
                              "file is "
                              "damaged or another was appended")
