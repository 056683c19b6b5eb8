"""Writes GGUF files byte by byte from the published format: good ones, and any kind of bad one."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

KINDS = {"B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "?": 7, "Q": 10, "q": 11, "d": 12}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(v: Any) -> bytes:
    """v: a str, a list of str, or (form, number or list of numbers)."""
    if isinstance(v, str):
        return struct.pack("<I", 8) + string(v)
    if isinstance(v, list):
        return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(string, v))
    form, content = v
    if isinstance(content, list):
        return struct.pack("<IIQ", 9, KINDS[form], len(content)) + struct.pack(f"<{len(content)}{form}", *content)
    return struct.pack("<I" + form, KINDS[form], content)


def info(name: str | bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """dims: fastest first."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(keys: list[tuple[str, Any]], infos: list[bytes], data: bytes = b"", *, version: int = 3, alignment: int = 32,
         counts: tuple[int, int] | None = None, magic: bytes = b"GGUF") -> bytes:
    tensors, number = counts or (len(infos), len(keys))
    head = magic + struct.pack("<IQQ", version, tensors, number)
    head += b"".join(string(k) + (v if isinstance(v, bytes) else value(v)) for k, v in keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + data


def model(tensors: dict[str, tuple[int, tuple[int, ...], np.ndarray]], keys: list[tuple[str, Any]],
          alignment: int = 32) -> bytes:
    """tensors: name -> (type, torch's shape, bytes)."""
    infos, data = [], b""
    for name, (kind, shape, raw) in tensors.items():
        infos.append(info(name, shape[::-1], kind, len(data)))
        data += raw.tobytes() + b"\0" * (-raw.nbytes % alignment)
    if alignment != 32:
        keys = [*keys, ("general.alignment", ("I", alignment))]
    return file(keys, infos, data, alignment=alignment)
