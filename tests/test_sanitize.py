"""The CPU kernels under the address and undefined-behaviour sanitizers: every case that is no network, at the lowest
and the highest level of this machine. ``make sanitize`` runs all op tests so, at every level."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldmfast.ops import _load

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or ""


def runtime(name: str) -> str:
    """Where the compiler has a library of its run time; it answers with the bare name if it has none."""
    if not COMPILER:
        return ""
    command = [COMPILER, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if os.path.isabs(path) else ""


ASAN, STDCXX = runtime("libasan.so"), runtime("libstdc++.so")
LEVELS = _load.host_module().cpu_levels() if _load.host_module() else []


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    if not LEVELS:
        pytest.skip(f"no compiled kernels here: {_load.build_record().get('host', 'not built')}")
    if not ASAN:
        pytest.skip(f"the compiler {COMPILER or 'g++'} has no libasan.so")
    folder = tmp_path_factory.mktemp("sanitized")
    env = {**os.environ, "LDMFAST_CUDA": "0", "LDMFAST_SANITIZE": f"{LEVELS[0]} {LEVELS[-1]}"}
    command = [sys.executable, "setup.py", "-q", "build", "-b", str(folder / "build"), "--build-lib", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    library = folder / "ldmfast/libldmfast_ops.so"
    assert done.returncode == 0 and library.exists(), done.stdout + done.stderr
    assert b"__asan_report_load" in library.read_bytes() and b"__ubsan_handle" in library.read_bytes()
    return folder


@pytest.mark.parametrize("level", sorted({*LEVELS[:1], *LEVELS[-1:]}) or ["none"])
def test_no_access_out_of_bounds_and_no_undefined_behaviour(sanitized, level):
    env = {**os.environ, "LD_PRELOAD": f"{ASAN} {STDCXX}", "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1",
           "PYTHONPATH": str(sanitized), "LDMFAST_CPU_ISA": level}
    done = subprocess.run([sys.executable, "tests/parity.py"], cwd=ROOT, env=env, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "live: cpp" in done.stdout and str(sanitized) in done.stdout
