"""aarch64 without an aarch64 machine: the sources through a cross compiler, by setup.py's own rules; and what depends
on csrc/common alone, in an emulator. The kernels themselves cannot run here: they need a torch for aarch64. The
compiler in the `ziglang` package is not taken: it has no syntax check, and 101 MB are too much for
requirements-dev.txt."""

from __future__ import annotations

import importlib.util
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CROSS = shutil.which("aarch64-linux-gnu-g++") or ""
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static") or ""
needs_cross = pytest.mark.skipif(not CROSS, reason="no aarch64-linux-gnu-g++ on PATH (Debian: g++-aarch64-linux-gnu)")
needs_emulator = pytest.mark.skipif(not EMULATOR, reason="no qemu-aarch64 on PATH (Debian: qemu-user)")
needs_cxx = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ on PATH")


def plan_for(machine: str, compiler: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """setup.py, and its plan as it is made on such a machine."""
    spec = importlib.util.spec_from_file_location("ldmfast_setup", ROOT / "setup.py")
    assert spec and spec.loader
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv("CXX", compiler)
    return setup, setup.Plan("cpu")


@needs_cross
def test_every_source_compiles_for_aarch64_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The neon level was written on x86 and had met no compiler. Of the generic level one source is enough: what
    differs from neon's is the registration, which is one macro."""
    _, plan = plan_for("aarch64", CROSS, monkeypatch)
    assert list(plan.levels) == ["generic", "neon"], "the compiler refuses a level's flags"
    plan.cpu()
    plan.host()
    units = {build.split()[1]: (build.split()[-1], flags.partition("=")[2])
             for build, flags in zip(plan.text, plan.text[1:], strict=False) if ": cxx " in build}
    wanted = [out for out in units if not out.endswith(".generic.o:") or out.startswith("geglu.")]
    assert len(wanted) == len(list((ROOT / "csrc/cpu").glob("*.cpp"))) + 2
    for source, flags in (units[out] for out in wanted):
        command = f"{plan.cxx} {plan.flags} {plan.include} {flags} -Werror -fsyntax-only {source}"
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source}: {done.stderr[-3000:]}"


def check_vectors(folder: Path, compiler: str, level: str, setup: Any, *runner: str) -> None:
    flags = shlex.split(f"-std=c++17 {setup.WARN} -Werror {setup.PLAIN} -static {level} -I{ROOT / 'csrc'}")
    program = folder / "vec_check"
    subprocess.run([compiler, *flags, str(ROOT / "tests/vec_check.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("\n") == 10, done.stdout + done.stderr


@needs_cross
@needs_emulator
@pytest.mark.parametrize("level", ["generic", "neon"])
def test_vectors_on_aarch64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    setup, plan = plan_for("aarch64", CROSS, monkeypatch)
    check_vectors(tmp_path, CROSS, plan.levels[level], setup, EMULATOR)


@needs_cxx
def test_vectors_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same program at the lowest level of this machine: it tells what is wrong with the check from what is wrong
    with aarch64."""
    setup, plan = plan_for(platform.machine(), "g++", monkeypatch)
    check_vectors(tmp_path, "g++", plan.levels["generic"], setup)


@needs_cross
@needs_emulator
def test_the_neon_level_is_not_taken_where_it_cannot_run(tmp_path: Path) -> None:
    """It once was on every aarch64: on a Raspberry Pi 4 (Cortex-A72, ARMv8.0) its first atomic of ARMv8.1 ends the
    process."""
    source, program = tmp_path / "levels.cpp", tmp_path / "levels"
    source.write_text('#include "common/isa.h"\n#include <cstdio>\n'
                      "int main() { for (auto& n : ldmfast::isa::available()) std::puts(n.name); }\n")
    subprocess.run([CROSS, "-std=c++17", "-static", "-DLDMFAST_HAVE_GENERIC", "-DLDMFAST_HAVE_NEON",
                    f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    for cpu, levels in {"cortex-a72": ["generic"], "neoverse-n1": ["generic", "neon"]}.items():
        out = subprocess.run([EMULATOR, "-cpu", cpu, str(program)], capture_output=True, text=True, check=True).stdout
        assert out.split() == levels, cpu
