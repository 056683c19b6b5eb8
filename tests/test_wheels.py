"""tools/build_wheels.py: the wheel of the CPU in an empty environment, packing for another Python, and what a wheel
says that does not fit the installed CUDA."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmfast import checkpoints
from ldmfast.ops import _load

ROOT = Path(__file__).resolve().parent.parent
THIS = ".".join(map(str, sys.version_info[:2]))
OTHERS = [p for p in os.environ.get("LDMFAST_OTHER_TORCH", "").split(os.pathsep) if p]
needs_build = pytest.mark.skipif(not _load.load_cpu().loaded, reason="no compiled kernels here")


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("build_wheels", ROOT / "tools/build_wheels.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tool, tmp_path_factory) -> Callable[[str], Path]:
    """The +cpu wheel of a Python, not yet audited (auditwheel is not among the requirements of the tests)."""
    scratch = tmp_path_factory.mktemp("wheels")
    base = tool.base_wheel("cpu", scratch)

    def of(version: str) -> Path:
        python = tool.find_python(version)
        return tool.repack(base, python, "cpu", tool.host_module(python, "cpu", scratch), scratch / "cpu/build")
    return of


@pytest.fixture(scope="module")
def wheel(made) -> Path:
    return made(THIS)


RUNS = """
import json, torch, ldmfast, ldmfast.kernels
x, w = torch.randn(2, 32, 4, 4), torch.ones(32)
y = ldmfast.ops.group_norm_silu(x, 8, w, w, 1e-5)
wanted = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8, w, w))
print(json.dumps({"file": ldmfast.__file__, "error": float((y - wanted).abs().max()), "live": ldmfast.info()["ops"],
                  "torch": torch.__version__, "levels": ldmfast.info()["cpu_levels"],
                  "build": ldmfast.ops._load.build_record()}))
"""
SHARED = """
import json, ldmfast
from ldmfast.checkpoints import open_folder
from ldmfast.pipelines.load import ASSETS
parts = open_folder(ASSETS / "tiny_dit")
print(json.dumps({"weights": sorted(str(p.relative_to(ASSETS)) for p in ASSETS.rglob("*.safetensors")),
                  "tensors": {p: sorted(parts.tensors(p)) for p in parts.names if p.startswith(("vae", "text_encoder"))
                              and parts.index[p][0]},
                  "configs": {p: parts.config(p) for p in ("vae", "text_encoder_2", "tokenizer_2")},
                  "bytes": sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file())}))
"""


def installed(wheel: Path, folder: Path, python: str = sys.executable) -> Path:
    """An environment of that interpreter with nothing but the wheel's files, and the packages beside its torch."""
    code = "import sys, torch; print('%d.%d' % sys.version_info[:2], torch.__path__[0])"
    said = subprocess.run([python, "-c", code], text=True, capture_output=True, check=True).stdout
    version, torch_folder = said.split()
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    site = folder / f"lib/python{version}/site-packages"
    zipfile.ZipFile(wheel).extractall(site)
    (site / "torch.pth").write_text(str(Path(torch_folder).parent) + "\n")
    return site


def answer(folder: Path, code: str) -> Any:
    done = subprocess.run([folder / "bin/python", "-I", "-W", "error::RuntimeWarning", "-c", code], text=True,
                          cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_build
def test_the_wheel_runs_in_an_empty_environment(wheel, tmp_path):
    """Nothing but the wheel and torch: here the torch it was built with."""
    site = installed(wheel, tmp_path / "env")
    found = answer(tmp_path / "env", RUNS)
    assert found["file"].startswith(str(site)) and found["torch"] == torch.__version__
    assert found["error"] < 1e-5 and found["live"]["group_norm_silu"]["cpu"] == "cpp" and found["levels"]
    assert found["build"]["wheel"] == "cpu" and found["build"]["host"] == "built"


@needs_build
@pytest.mark.skipif(not OTHERS, reason="LDMFAST_OTHER_TORCH names no interpreters with another torch (every other one "
                                       "in the index comes with gigabytes of CUDA)")
@pytest.mark.parametrize("python", OTHERS)
def test_the_wheel_runs_on_another_torch(made, python, tmp_path):
    """Not the torch it was built with: LDMFAST_OTHER_TORCH=/env-2.10/bin/python:/env-2.11/bin/python."""
    asked = subprocess.run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True,
                           capture_output=True, check=True).stdout.strip()
    site = installed(made(asked), tmp_path / "env", python)
    found = answer(tmp_path / "env", RUNS)
    assert found["file"].startswith(str(site)) and found["torch"] != torch.__version__
    assert found["error"] < 1e-5 and found["live"]["group_norm_silu"]["cpu"] == "cpp" and found["levels"]


@needs_build
def test_the_wheel_holds_every_shipped_file_once(wheel, tmp_path):
    """In a checkout the two shipped models share files by links, of which a wheel would make copies (22.7 MB)."""
    installed(wheel, tmp_path / "env")
    found, here = answer(tmp_path / "env", SHARED), checkpoints.open_folder(ROOT / "ldmfast/assets/tiny_dit")
    assert found["weights"] == ["tiny/text_encoder/model.safetensors", "tiny/unet/diffusion_pytorch_model.safetensors",
                                "tiny/vae/diffusion_pytorch_model.safetensors",
                                "tiny_dit/text_encoder/model.safetensors",
                                "tiny_dit/transformer/diffusion_pytorch_model.safetensors",
                                "tiny_lcm/pytorch_lora_weights.safetensors"]
    assert found["bytes"] <= 20_000_000
    assert set(found["tensors"]) == {"vae", "text_encoder", "text_encoder_2"}
    for part, names in found["tensors"].items():
        assert names == sorted(here.tensors(part))
    for part, config in found["configs"].items():
        assert config == here.config(part)


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
def test_a_library_that_needs_a_newer_torch_is_refused(tool, tmp_path):
    """What it asks for weakly it does without. The audit itself is not among the requirements of the tests: this one
    knows a function of torch 2.11, as it does."""
    audit = tmp_path / "torch-abi-audit"
    audit.write_text("#!/bin/sh\nv=2.9; grep -q torch_from_blob \"$3\" && v=2.11\necho \"  Min torch:   $v.0\"\n")
    audit.chmod(0o755)
    ours = _load.PACKAGE / "libldmfast_ops.so"
    assert b"torch_from_blob" in ours.read_bytes()
    assert tool.oldest_torch(ours, tmp_path, tmp_path) == "2.9.0"
    source, library = tmp_path / "a.cpp", tmp_path / "liba.so"
    for weak in ("__attribute__((weak))", ""):
        source.write_text(f'extern "C" {weak} int torch_from_blob();\nint f() {{ return torch_from_blob(); }}\n')
        subprocess.run(["c++", "-shared", "-fPIC", source, "-o", library], check=True)
        if weak:
            assert tool.oldest_torch(library, tmp_path, tmp_path) == "2.9.0"
    with pytest.raises(tool.Missing, match=r"liba.so: the audit does not say that torch 2.10 is new enough.*2.11.0"):
        tool.oldest_torch(library, tmp_path, tmp_path)


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
