"""Wheels: what is in one, and that one can be made and used on a machine without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ldmfast.ops import _load

ROOT = Path(__file__).resolve().parent.parent


def wheel(folder: Path, **env: str) -> Path:
    """Builds a wheel in a scratch folder; the objects of the checkout's own build are used again."""
    command = [sys.executable, "setup.py", "-q", "build", "-b", str(folder / "build"),
               "egg_info", "-e", str(folder), "bdist_wheel", "-b", str(folder / "wheel"), "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "LDMFAST_CUDA": "0", **env}, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def sources(folder: str, package: str) -> set[str]:
    return {f"{package}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob("*.py")}


def check_content(path: Path, compiled: bool) -> None:
    names = set(zipfile.ZipFile(path).namelist())
    assert sources("ldmfast", "ldmfast") | sources("kernels", "ldmfast/kernels") <= names
    # a wheel has no links; shared.json says in which folder their files are
    assets = {f"ldmfast/{p.relative_to(ROOT / 'ldmfast')}" for p in (ROOT / "ldmfast/assets").rglob("*")
              if p.is_file() and not p.is_symlink()}
    assert {a for a in assets if "__pycache__" not in a} <= names
    assert not [n for n in names if n.startswith(("tests/", "csrc/", "bench/", "kernels/"))]
    libraries = {n for n in names if n.endswith(".so")}
    assert ("ldmfast/libldmfast_ops.so" in libraries) == compiled
    assert any(n.startswith("ldmfast/_C.") for n in libraries) == compiled


@pytest.mark.parametrize(("compiler", "reason"), [("/nowhere/g++", "/nowhere/g++"), ("/bin/false", "compiler failed")])
def test_without_a_compiler_the_package_installs_and_runs(tmp_path, compiler, reason):
    path = wheel(tmp_path, CXX=compiler)
    check_content(path, compiled=False)
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    code = """
import torch, ldmfast, ldmfast.kernels
print(ldmfast.info())
assert all(live["cpu"] == "reference" for live in ldmfast.info()["ops"].values())
assert ldmfast.ops.geglu(torch.tensor([2.0, 0.0, 1.0, 1.0])).sum() > 1.6
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "LDMFAST_CPU_ISA": ""})
    assert done.returncode == 0, done.stderr
    assert "C++ kernels" in done.stdout and reason in done.stdout


def test_compiled_wheel_holds_everything_and_is_for_this_platform(tmp_path):
    if not _load.load_cpu().loaded:
        assert _load.build_record()["cpu"] != "built"  # no compiler here: the test above is the whole story
        return
    path = wheel(tmp_path)
    check_content(path, compiled=True)
    assert not path.name.endswith("none-any.whl")


def test_library_needs_no_python_and_no_cuda():
    """One libldmfast_ops.so serves every Python and every torch from 2.10 on, CPU-only ones included."""
    library = _load.load_cpu()
    if not library.loaded:
        assert library.reason
        return
    needed = subprocess.run(["readelf", "-d", str(library.path)], capture_output=True, text=True, check=True).stdout
    for word in ("libpython", "libcudart", "libtorch_cuda", "libtorch_python", "RPATH", "RUNPATH"):
        assert word not in needed
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", str(library.path)], capture_output=True, text=True,
                             check=True).stdout
    assert "at::" not in symbols and "c10::" not in symbols, "only the C shim is stable"
