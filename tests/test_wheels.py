"""tools/build_wheels.py: the wheel of the CPU in an empty environment, packing for another Python, and what a wheel
says that does not fit the installed CUDA."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmfast.ops import _load

ROOT = Path(__file__).resolve().parent.parent
THIS = ".".join(map(str, sys.version_info[:2]))
needs_build = pytest.mark.skipif(not _load.load_cpu().loaded, reason="no compiled kernels here")


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("build_wheels", ROOT / "tools/build_wheels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tool, tmp_path_factory) -> Path:
    """The +cpu wheel of this Python, not yet audited (auditwheel is not among the requirements of the tests)."""
    scratch = tmp_path_factory.mktemp("wheels")
    base = tool.base_wheel("cpu", scratch)
    python = tool.find_python(THIS)
    return tool.repack(base, python, "cpu", tool.host_module(python, "cpu", scratch), scratch / "cpu/build")


@needs_build
def test_the_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    """Nothing but the wheel and torch: here the torch it was built with, by name, as no other is to be had without
    gigabytes (the index has no CPU build of 2.10). That the library asks no more of torch than 2.10 has is
    torch-abi-audit's word."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    site = tmp_path / f"env/lib/python{THIS}/site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    code = """
import json, torch, ldmfast, ldmfast.kernels
x, w = torch.randn(2, 32, 4, 4), torch.ones(32)
y = ldmfast.ops.group_norm_silu(x, 8, w, w, 1e-5)
wanted = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8, w, w))
print(json.dumps({"file": ldmfast.__file__, "error": float((y - wanted).abs().max()), "live": ldmfast.info()["ops"],
                  "torch": torch.__version__, "levels": ldmfast.info()["cpu_levels"],
                  "build": ldmfast.ops._load.build_record()}))
"""
    done = subprocess.run([tmp_path / "env/bin/python", "-I", "-W", "error::RuntimeWarning", "-c", code], text=True,
                          cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["file"].startswith(str(site)) and found["torch"] == torch.__version__
    assert found["error"] < 1e-5 and found["live"]["group_norm_silu"]["cpu"] == "cpp" and found["levels"]
    assert found["build"]["wheel"] == "cpu" and found["build"]["host"] == "built"


@needs_build
def test_the_record_of_a_repacked_wheel_is_true(wheel):
    with zipfile.ZipFile(wheel) as archive:
        version = wheel.name.split("-")[1]
        assert version.endswith("+cpu")
        rows = list(csv.reader(io.StringIO(archive.read(f"ldmfast-{version}.dist-info/RECORD").decode())))
        assert sorted(r[0] for r in rows) == sorted(archive.namelist())
        for name, digest, size in rows:
            if digest:
                data = archive.read(name)
                assert len(data) == int(size)
                found = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                assert digest == f"sha256={found}", name
        assert f"Version: {version}\n" in archive.read(f"ldmfast-{version}.dist-info/METADATA").decode()
        assert not any(name.endswith("libldmfast_cuda.so") for name in archive.namelist())


@needs_build
def test_a_library_that_does_not_name_torchs_is_refused(tool, tmp_path):
    """The first CUDA library did not name libtorch_cuda.so, as the linker drops what a stub does not give: on a GPU its
    first kernel would have ended the process with "undefined symbol: aoti_torch_get_current_cuda_stream"."""
    tool.check_needs(_load.PACKAGE / "libldmfast_ops.so")
    copy = tmp_path / "libldmfast_cuda.so"
    copy.write_bytes((_load.PACKAGE / "libldmfast_ops.so").read_bytes())
    with pytest.raises(tool.Missing, match=r"libldmfast_cuda.so is linked without libtorch_cuda.so"):
        tool.check_needs(copy)


@needs_build
def test_repacking_changes_the_python_and_nothing_else(tool, wheel, tmp_path):
    host = tmp_path / "_C.cpython-399-x86_64-linux-gnu.so"
    host.write_bytes(b"another")
    python = tool.Python("3.99", "python3.99", "headers", ".cpython-399-x86_64-linux-gnu.so")
    other = tool.repack(wheel, python, "cu132", host, tmp_path)
    assert "-cp399-cp399-" in other.name
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(other) as b:
        changed = {n for n in b.namelist() if n not in a.namelist() or a.read(n) != b.read(n)}
        folder = f"ldmfast-{wheel.name.split('-')[1]}.dist-info"
        assert changed == {f"ldmfast/{host.name}", "ldmfast/_build.json", f"{folder}/WHEEL", f"{folder}/RECORD"}
        assert not {n for n in a.namelist() if n not in b.namelist() and not n.startswith("ldmfast/_C.")}
        assert "Tag: cp399-cp399-" in b.read(f"{folder}/WHEEL").decode()
        assert json.loads(b.read("ldmfast/_build.json"))["wheel"] == "cu132"


def test_what_cannot_be_had_is_named_and_fails(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(sys, "argv", ["build_wheels.py", "--cuda", "12.6", "--python", "3.2", "--out", str(tmp_path),
                                      "--scratch", str(tmp_path / "scratch")])
    monkeypatch.setattr(tool, "audit_tools", lambda scratch: (_ for _ in ()).throw(tool.Missing("no index")))
    assert tool.main() == 1
    said = capsys.readouterr().out
    assert "NOT DONE: Python 3.2: no Python 3.2 with headers; looked at" in said
    assert "NOT DONE: cu126: CUDA 12.6: the package index has no nvcc before 13; set NVCC to one of 12.6" in said
    assert "NOT DONE: not audited, tagged linux only: no index" in said


# wheel, torch, its CUDA, GPUs -> what is said, "" for nothing
MATCHES = {
    "source": ("", "2.13.0+cu130", "13.0", 1, ""),
    "fits": ("cu130", "2.11.0+cu130", "13.0", 1, ""),
    "newer minor": ("cu132", "2.11.0+cu130", "13.0", 1, ""),
    "older minor": ("cu126", "2.10.0+cu128", "12.8", 1, ""),
    "cpu on cpu": ("cpu", "2.13.0+cpu", None, 0, ""),
    "cpu, torch with CUDA but no GPU": ("cpu", "2.13.0+cu130", "13.0", 0, ""),
    "cpu on a GPU": ("cpu", "2.11.0+cu130", "13.0", 2,
                     "expects a torch without CUDA, or no GPU; found torch 2.11.0+cu130 with CUDA 13.0 and 2 GPUs. "
                     "Its CUDA kernels do not run; to fix it: pip install --force-reinstall --no-deps "
                     "'ldmfast==1.2+cu130'"),
    "other major": ("cu130", "2.10.0+cu128", "12.8", 1,
                    "expects a torch with CUDA 13; found torch 2.10.0+cu128 with CUDA 12.8 and 1 GPU. Its CUDA kernels "
                    "do not run; to fix it: pip install --force-reinstall --no-deps 'ldmfast==1.2+cu128'"),
    "between two": ("cu126", "2.12.0+cu131", "13.1", 1, "--no-deps 'ldmfast==1.2+cu130'"),
    "before the first": ("cu130", "2.10.0+cu121", "12.1", 1, "--no-deps 'ldmfast==1.2+cu126'"),
    "no wheel": ("cu130", "2.20.0+cu140", "14.0", 1, "--no-deps --no-binary ldmfast 'ldmfast==1.2'"),
    "no CUDA": ("cu130", "2.13.0+cpu", None, 0, "found torch 2.13.0+cpu without CUDA. Its CUDA kernels do not run; to "
                "fix it: pip install --force-reinstall --no-deps 'ldmfast==1.2+cpu'"),
}


@pytest.mark.parametrize("name", MATCHES)
def test_a_wheel_that_does_not_fit_says_expected_found_and_the_command(name):
    tag, installed, cuda, gpus, said = MATCHES[name]
    text = _load.wheel_mismatch(tag, "1.2", installed, cuda, gpus)
    assert text.endswith(said) if said else text == ""
    assert text.startswith(f"this is the wheel 1.2+{tag}, which expects") or not said
    assert "\n" not in text


def test_it_is_said_at_import(monkeypatch, tmp_path):
    monkeypatch.setattr(_load, "PACKAGE", tmp_path)
    (tmp_path / "_build.json").write_text(json.dumps({"cpu": "built", "cuda": "built", "wheel": "cu130"}))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.warns(RuntimeWarning, match=r"found torch \S+ with CUDA 12.8.*'ldmfast==\S+\+cu128'"):
        library = _load.load_cuda()
    assert not library.loaded and "expects a torch with CUDA 13" in library.reason


def test_the_workflow_builds_every_wheel_that_a_message_may_name():
    text = (ROOT / ".github/workflows/wheels.yml").read_text()
    assert "never run" in text.split("\n\n")[0]
    for tag in _load.WHEELS:
        assert f'"{tag[2:4]}.{tag[4:]}"' in text
