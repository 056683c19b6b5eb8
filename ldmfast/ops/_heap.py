"""How glibc's malloc keeps memory that is freed: not at all while a model is loaded, up to a limit while it runs.

Nothing is changed where the user has set malloc up himself, or where there is another C library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Any

_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h


@functools.cache
def _glibc() -> Any:
    """The C library, None where its malloc is not ours to set."""
    if any(name in os.environ for name in _SET_BY_USER):
        return None
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", ()):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def keep_freed_memory() -> None:
    """From now on blocks up to 64 MiB that the process frees are used again; what is free at this moment goes back.

    glibc takes every block above 32 MiB fresh from the kernel and gives it back at once: its pages are then faulted in
    and cleared anew at each use, which costs more than what an op does with them. Blocks up to 64 MiB, which a UNet's
    are, come from the heap instead, which keeps up to 512 MiB that is free; larger ones would leave holes as large.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)
        if not libc.mallopt(_MMAP_THRESHOLD, 64 << 20):  # older versions take no more than half of an arena
            libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, 512 << 20)


@contextlib.contextmanager
def freed_at_once() -> Iterator[None]:
    """Inside, blocks from 256 KiB up go back to the system when they are freed; then as keep_freed_memory.

    While weights are packed, what stays and what goes alternate: in the heap that leaves holes, which come to 140 MiB
    with an SD 1.5 UNet, and which the first step fills with small blocks beside new room for its large ones.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_THRESHOLD, 256 << 10)
    try:
        yield
    finally:
        keep_freed_memory()
