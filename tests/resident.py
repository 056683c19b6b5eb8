"""Resident memory: of this process, and processes made to measure it in.

A figure is of use only where nothing but the code in question moves it. So code is measured in a fresh process (a
suite's own has a heap full of holes, and a child's ru_maxrss starts at its parent's), with one thread, whose malloc
maps every block from 64 KiB up and gives it back when it is freed: what its heap keeps for later otherwise depends on
the order in which blocks of all sizes came and went, and has been whole tensors.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MIB = 1 << 20
NEEDED = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see resident memory")
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "OMP_NUM_THREADS": "1"}
TESTS = Path(__file__).resolve().parent


def status(key: str) -> int:
    """A figure of this process in bytes; VmRSS is what is resident now, VmHWM the most since ``forget``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


def now() -> int:
    """What is resident when what was freed has gone back: also pages in the middle of malloc's heap (glibc)."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return status("VmRSS")


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak(call: Callable[[], object]) -> int:
    """Bytes that were resident at most during a call, over what was before it."""
    before = now()
    forget()
    call()
    return status("VmHWM") - before


def check() -> None:
    """Memory that is taken must be seen while it is there, and gone afterwards. The kernel counts pages in batches of
    each processor: some 256 KiB may come late."""
    before = now()
    seen = peak(lambda: bytearray(64 * MIB))
    left = now() - before
    held = bytearray(64 * MIB)
    holding = now() - before
    if min(seen, holding) < 63 * MIB or max(seen, holding) > 66 * MIB or left > MIB or len(held) != 64 * MIB:
        raise SystemExit(f"the meter is blind: 64 MiB were {seen / MIB:.1f} at the peak, {holding / MIB:.1f} held and "
                         f"{left / MIB:.1f} left behind")


def fresh(code: str, *args: object) -> str:
    """What code prints in a fresh process that can import the tests' modules; it follows a check of the meter."""
    done = subprocess.run([sys.executable, "-c", f"import resident\nresident.check()\n{code}", *map(str, args)],
                          capture_output=True, text=True, check=False, env={
        **os.environ, **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "checkpoints"), str(TESTS.parent),
                                       os.environ.get("PYTHONPATH", "")])})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
