"""Finds and loads the compiled libraries and the Triton folder; remembers why something is not there."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import LdmfastError

PACKAGE = Path(__file__).resolve().parent.parent
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx", "neon")


@dataclass(frozen=True)
class Library:
    """State of one compiled library: loaded, or the reason why not."""

    path: Path
    loaded: bool
    reason: str


def build_record() -> dict[str, Any]:
    """What setup.py wrote about its last build ({} in a checkout that was never installed)."""
    try:
        return json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


def host_module() -> ModuleType | None:
    """ldmfast._C, or None where it was not built."""
    try:
        return importlib.import_module("ldmfast._C")
    except ImportError:
        return None


def check_isa() -> None:
    """Refuses an LDMFAST_CPU_ISA that is not a level, or one that this CPU or this build does not have."""
    wanted = os.environ.get("LDMFAST_CPU_ISA", "")
    if not wanted:
        return
    if wanted not in LEVELS:
        raise LdmfastError(f"LDMFAST_CPU_ISA={wanted!r} is not a level; choose one of "
                           f"{', '.join(LEVELS)} or unset it")
    host = host_module()
    if host is None:
        raise LdmfastError(f"LDMFAST_CPU_ISA={wanted} needs the compiled kernels, which are not there; "
                           "unset it or install with a C++ compiler")
    if wanted not in host.cpu_levels():
        raise LdmfastError(f"LDMFAST_CPU_ISA={wanted} does not run here: this CPU and this build have "
                           f"{', '.join(host.cpu_levels())}; choose one of these or unset it")


def level() -> str:
    """The instruction-set level whose kernels run ("" without a compiled library)."""
    host = host_module()
    return host.level_in_use() if host is not None else ""


def _load(name: str, part: str) -> Library:
    path = PACKAGE / name
    if not path.exists():
        return Library(path, False, build_record().get(part, "not built (pip install -e . builds it)"))
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = f"{name} does not load: {str(error).splitlines()[0]}"
        warnings.warn(f"ldmfast: {reason}; running on the slow references", RuntimeWarning, stacklevel=3)
        return Library(path, False, reason)
    return Library(path, True, "")


def load_cpu() -> Library:
    check_isa()
    return _load("libldmfast_ops.so", "cpu")


def load_cuda() -> Library:
    """CUDA code sits in its own library, so that a CPU build of torch never looks for libcudart."""
    path = PACKAGE / "libldmfast_cuda.so"
    if torch.version.cuda is None:
        return Library(path, False, "this torch has no CUDA")
    return _load(path.name, "cuda")


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def checkout() -> Path | None:
    """The source tree this package runs from, or None for an installed wheel."""
    root = PACKAGE.parent
    return root if (root / "csrc").is_dir() and (root / "setup.py").exists() else None


def kernel_file(name: str) -> Path:
    """Where the Triton kernel of an op is, if it is: beside ldmfast/ in a checkout, inside it in a wheel."""
    root = checkout()
    return (root / "kernels" if root else PACKAGE / "kernels") / f"{name}.py"


def kernel_module(name: str) -> ModuleType:
    """Imports ldmfast.kernels.<name>, and Triton with it."""
    return importlib.import_module(f"ldmfast.kernels.{name}")


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Inside, results of 16 MiB and more that are let go of lend their memory to later ones of the same size or half of
    it, of any thread; free memory and that in use are never more than the most that was in use. What is free at the
    end of the last such block of code goes back to the system. Nothing happens below torch 2.11."""
    hold = _hold_blocks()
    hold(1)
    try:
        yield
    finally:
        hold(0)


@functools.cache
def _hold_blocks() -> Callable[[int], Any]:
    path = PACKAGE / "libldmfast_ops.so"
    return ctypes.CDLL(str(path)).ldmfast_hold_blocks if path.exists() else lambda on: None


def keep_freed_memory() -> None:
    """From now on blocks up to 64 MiB that the process frees are used again instead of being cleared anew by the
    kernel; what is free at this moment goes back to it."""
    host = host_module()
    if host is not None:
        host.keep_freed_memory()
