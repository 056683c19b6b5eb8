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
WHEELS = ("cu126", "cu128", "cu129", "cu130", "cu132")  # what .github/workflows/wheels.yml makes, beside "cpu"


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


def _fitting_wheel(cuda: str | None) -> str:
    """The wheel for a torch with this CUDA: of the same major version the newest not above it, else the oldest; "" if
    there is none."""
    if cuda is None:
        return "cpu"
    major, minor = (int(n) for n in cuda.split(".")[:2])
    same = sorted((int(tag[4:]), tag) for tag in WHEELS if int(tag[2:4]) == major)
    below = [tag for number, tag in same if number <= minor]
    return below[-1] if below else same[0][1] if same else ""


def wheel_mismatch(wheel: str, version: str, torch_version: str, cuda: str | None, gpus: int) -> str:
    """What to tell about a wheel that does not fit the installed torch: expected, found, and the command that helps; ""
    where it fits (any CUDA of the same major version does).

    wheel: its tag, "cpu" or "cu130"; "" for a build from source, which is not judged. version: of ldmfast. cuda: of
    torch, "13.0" or None. gpus: how many torch sees; without any, a CPU wheel fits every torch.
    """
    if not wheel or (wheel == "cpu" and not (cuda and gpus)):
        return ""
    if wheel != "cpu" and cuda is not None and wheel[2:4] == cuda.split(".")[0]:
        return ""
    wanted = "a torch without CUDA, or no GPU" if wheel == "cpu" else f"a torch with CUDA {wheel[2:4]}"
    found = f"torch {torch_version} " + (f"with CUDA {cuda}" if cuda else "without CUDA")
    found += f" and {gpus} GPU{'s' * (gpus != 1)}" if gpus else ""
    fitting = _fitting_wheel(cuda)
    command = (f"pip install --force-reinstall --no-deps 'ldmfast=={version}+{fitting}'" if fitting else
               f"pip install --force-reinstall --no-deps --no-binary ldmfast 'ldmfast=={version}'")
    return (f"this is the wheel {version}+{wheel}, which expects {wanted}; found {found}. Its CUDA kernels do not run; "
            f"to fix it: {command}")


def load_cuda() -> Library:
    """CUDA code sits in its own library, so that a CPU build of torch never looks for libcudart."""
    from .. import __version__

    path, wheel, cuda = PACKAGE / "libldmfast_cuda.so", str(build_record().get("wheel", "")), torch.version.cuda
    gpus = torch.cuda.device_count() if wheel and cuda is not None else 0
    wrong = wheel_mismatch(wheel, __version__, torch.__version__, cuda, gpus)
    if wrong:
        warnings.warn(f"ldmfast: {wrong}", RuntimeWarning, stacklevel=3)
        return Library(path, False, wrong)
    if cuda is None:
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
    try:
        return ctypes.CDLL(str(PACKAGE / "libldmfast_ops.so")).ldmfast_hold_blocks
    except (OSError, AttributeError):  # not built, or does not load, which load_cpu() has said
        return lambda on: None
