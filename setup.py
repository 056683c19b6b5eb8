"""Builds the native parts with ninja. A part that cannot be built is left out with a warning, never an
error: the package then runs on its references, and ldmfast.info() repeats the reason.
LDMFAST_CUDA=0|1: leave CUDA out, or insist on it (default: built where nvcc is found). LDMFAST_CUDA_ARCHS: default
"80 90a 100a". LDMFAST_SANITIZE=1: address and undefined-behaviour sanitizers; or the names of levels, these only."""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KIND = "sanitize" if (ONLY := os.environ.get("LDMFAST_SANITIZE", "")) else "native"
ARCHS = os.environ.get("LDMFAST_CUDA_ARCHS", "80 90a 100a")
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the oldest torch that the library serves: 2.10
WARN = "-Wall -Wextra -Wno-attributes -Wno-maybe-uninitialized"  # the last two come from system headers
PLAIN = "-O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast"
SANITIZE = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
V4, DOT = "-march=x86-64-v4 -mprefer-vector-width=512", "-mavx512bf16 -mavx512vnni"
LEVELS = {  # lowest first: the linker keeps the first copy of a shared inline function (csrc/common/stable.h)
    "x86_64": {
        "generic": "-march=x86-64", "avx2": "-march=x86-64-v3",
        "avx512": V4, "avx512_bf16": f"{V4} {DOT}",
        "amx": f"{V4} {DOT} -mavx512vbmi -mamx-tile -mamx-bf16 -mamx-int8"},
    "aarch64": {"generic": "", "neon": "-march=armv8.2-a+fp16"}}
LIBRARIES = {"cpu": "libldmfast_ops.so", "cuda": "libldmfast_cuda.so",
             "host": "_C" + sysconfig.get_config_var("EXT_SUFFIX")}
UNLINKED = [os.path.relpath(p, ROOT / "ldmfast") for p in ROOT.glob("ldmfast/assets/**/*") if not p.is_symlink()]


class Skip(Exception):
    """A part cannot be built here; the text says why."""


def tool(env: str, *names: str) -> str:
    wanted = [os.environ[env]] if os.environ.get(env) else list(names)
    if not (found := list(filter(None, map(shutil.which, wanted)))):
        raise Skip(f"no {' or '.join(wanted)} found")
    return found[0]


def package_dir(name: str) -> Path:
    if (spec := importlib.util.find_spec(name)) and spec.origin:
        return Path(spec.origin).parent
    raise Skip(f"python package {name} is not installed")


class Plan:
    """The ninja file of one part: one rule a compiler, one statement an object."""
    def __init__(self, part: str) -> None:
        self.text, torch = [f"builddir = {part}"], package_dir("torch")
        self.cxx = tool("CXX", "g++", "c++", "clang++")
        self.flags = f"-std=c++17 -fPIC -fvisibility=hidden {WARN} {PLAIN if KIND == 'native' else SANITIZE}"
        self.include = f"-I{ROOT / 'csrc'} -isystem {torch / 'include'}"
        self.libtorch = f"-L{torch / 'lib'} -ltorch -ltorch_cpu -lc10"
        levels = LEVELS.get(platform.machine(), {"generic": ""})
        self.levels = {n: f for n, f in levels.items() if (ONLY in ("", "1") or n in ONLY.split()) and self.takes(f)}
        self.have = " ".join(f"-DLDMFAST_HAVE_{name.upper()}" for name in self.levels)
        self.rule("cxx", f"{self.cxx} {self.flags} {self.include} $flags", compiles=True)
        self.rule("link", f"{self.cxx} {self.flags} -shared $in $flags -o $out")

    def takes(self, flags: str) -> bool:
        test = [self.cxx, *flags.split(), "-x", "c++", "-c", os.devnull, "-o", os.devnull]
        return subprocess.run(test, capture_output=True).returncode == 0

    def rule(self, name: str, command: str, compiles: bool = False) -> None:
        command += " -MMD -MF $out.d -c $in -o $out" if compiles else ""
        self.text += [f"rule {name}", f"  command = {command}", *["  depfile = $out.d", "  deps = gcc"][: 2 * compiles]]

    def add(self, out: str, rule: str, inputs: list[object], flags: str = "") -> str:
        self.text += [f"build {out}: {rule} {' '.join(map(str, inputs))}", f"  flags = {flags}"]
        return out

    def cpu(self) -> None:
        sources, objects = sorted((ROOT / "csrc/cpu").glob("*.cpp")), []
        for i, (level, flags) in enumerate(self.levels.items()):
            flags += f" {TARGET} {self.have} -DLDMFAST_LEVEL={level}{'' if i else ' -DLDMFAST_REGISTERS'}"
            objects += [self.add(f"{s.stem}.{level}.o", "cxx", [s], flags) for s in sources]
        self.add(LIBRARIES["cpu"], "link", objects, self.libtorch)

    def host(self, name: str = LIBRARIES["host"], headers: str = sysconfig.get_paths()["include"]) -> None:
        flags = f"{self.have} '-DLDMFAST_CUDA_ARCHS=\"{ARCHS}\"' -DLDMFAST_SANITIZED={int(KIND != 'native')}"
        flags += f" -isystem {package_dir('pybind11') / 'include'} -isystem {headers}"
        self.add(name, "link", [self.add(f"{name}.o", "cxx", [ROOT / "csrc/host/module.cpp"], flags)])

    def cuda(self) -> None:
        if os.environ.get("LDMFAST_CUDA") == "0":
            raise Skip("left out by LDMFAST_CUDA=0")
        nvcc, sources = tool("NVCC", "nvcc"), sorted((ROOT / "csrc/cuda").glob("*.cu"))
        code = " ".join(f"-gencode arch=compute_{a},code=[{'compute_80,' * (a == '80')}sm_{a}]" for a in ARCHS.split())
        flags = f"-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --expt-relaxed-constexpr {TARGET} -DUSE_CUDA"
        self.rule("nvcc", f"{nvcc} {flags} {self.include} {code}", compiles=True)
        # torch loads libtorch_cuda.so privately: a library that does not need it by name cannot see into it. A CPU
        # build of torch does not ship it: an empty one stands in, and the flag must come before it, so it is no input
        self.rule("nvlink", f"{nvcc} -shared -cudart shared -Xlinker --no-as-needed $in $flags -o $out")
        self.rule("stub", f"{self.cxx} -shared -Wl,-soname,libtorch_cuda.so -o $out -x c++ {os.devnull}")
        self.add(LIBRARIES["cuda"], "nvlink", [*(self.add(f"{s.stem}.cuda.o", "nvcc", [s]) for s in sources), "|",
                 self.add("stub/libtorch_cuda.so", "stub", [])], f"-Lstub -ltorch_cuda {self.libtorch}")


def make(part: str, out: Path, name: str, *arguments: str) -> Path:
    """Runs the plan of one part in the folder ``out``; the file it makes there."""
    getattr(plan := Plan(part), part)(*arguments)
    (out / f"{part}.ninja").write_text("\n".join(plan.text) + "\n")
    command = [sys.executable, "-m", "ninja", "-C", out, "-f", f"{part}.ninja", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Skip(f"the compiler failed: {done.stdout.strip()[-1500:]}")
    return out / name


def build(part: str, out: Path, package: Path) -> str:
    """Builds one part and puts it into the package. Returns "built", or why it is not there."""
    target = package / LIBRARIES[part]
    try:
        shutil.copy2(make(part, out, target.name), package / ".new")
        os.replace(package / ".new", target)  # a running process keeps the old file
        return "built"
    except (Skip, OSError) as error:
        if part == "cuda" and os.environ.get("LDMFAST_CUDA") == "1":
            sys.exit(f"LDMFAST_CUDA=1: {error}")
        target.unlink(missing_ok=True)  # no older build in its place
        return str(error)


class BuildNative(build_ext):
    def run(self) -> None:
        package = (ROOT if self.inplace or self.editable_mode else Path(self.build_lib)) / "ldmfast"
        out = ROOT / "build" / f"{KIND}-{sys.implementation.cache_tag}-{platform.machine()}"
        out.mkdir(parents=True, exist_ok=True)
        package.mkdir(parents=True, exist_ok=True)
        record = {part: build(part, out, package) for part in LIBRARIES}
        (package / "_build.json").write_text(json.dumps(record, indent=1) + "\n")
        for part in [p for p in ("cpu", "host") if record[p] != "built"]:
            self.warn(f"ldmfast: no compiled {part} part: {record[part]}")


if __name__ == "__main__":  # tools/build_wheels.py imports the above
    setup(
        packages=["ldmfast", *(f"ldmfast.{name}" for name in find_packages("ldmfast")), "ldmfast.kernels"],
        package_dir={"ldmfast.kernels": "kernels"}, ext_modules=[Extension("ldmfast._C", [], optional=True)],
        package_data={"ldmfast": ["_build.json", "py.typed", *UNLINKED]}, cmdclass={"build_ext": BuildNative},
    )
