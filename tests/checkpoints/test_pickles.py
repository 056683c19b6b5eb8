"""PyTorch files: read through the weights-only loader, told by content, and nothing in a hostile one ever runs."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import resident
import torch

from ldmfast.checkpoints import inspect, open_folder, open_single_file
from ldmfast.checkpoints.open_file import open_file
from ldmfast.errors import CheckpointError

MARK = "LDMFAST_TEST_MARK"


class MakesFolder:
    def __reduce__(self):
        return os.mkdir, (os.environ[MARK],)


class RunsCode:
    def __reduce__(self):
        return eval, (f"__import__('os').mkdir({os.environ[MARK]!r})",)


class Posix:
    """The payload that circulates: a shell command."""

    def __reduce__(self):
        return os.system, (f"mkdir {os.environ[MARK]}",)


class SetsState:
    """Runs in __setstate__ of an allowed class's neighbour: BUILD on an attribute of a module."""

    def __reduce__(self):
        return subprocess.Popen, (["mkdir", os.environ[MARK]],)


PAYLOADS = (MakesFolder, RunsCode, Posix, SetsState)


def _zip(value: object, protocol: int, compressed: bool = False) -> bytes:
    made = io.BytesIO()
    torch.save(value, made, pickle_protocol=protocol)
    if not compressed:
        return made.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def _tar(value: object, protocol: int) -> bytes:
    """torch's format before 0.1.10: sys_info, pickle, storages and tensors in a tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(value, protocol)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _legacy(value: object, protocol: int) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    return out.getvalue()


CONTAINERS = {
    "zip": _zip, "deflated zip": lambda v, p: _zip(v, p, True), "legacy": _legacy, "tar": _tar,
    "raw": lambda v, p: pickle.dumps(v, p),
    "zip without torch's names": lambda v, p: _plain_zip(pickle.dumps(v, p)),
}


def _plain_zip(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("data.pkl", data)
    return out.getvalue()


OPENERS = (open_file, open_single_file, inspect, lambda p: dict(open_file(p).read()),
           lambda p: open_folder(p.parent).weights("model"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("container", CONTAINERS)
def test_nothing_is_executed(container: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Every payload x protocol x ending x way of opening; a control shows that each payload would have run."""
    mark = tmp_path / "executed"
    monkeypatch.setenv(MARK, str(mark))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    refused = 0
    for payload in PAYLOADS:
        for protocol in range(6):
            if container != "raw" and protocol < 2 and container != "zip without torch's names":
                continue  # torch.save itself writes 2 and above
            for value in (payload(), {"state_dict": {"a.weight": payload()}}, {"a": torch.ones(2), "b": [payload()]}):
                if "torch" not in container and container != "legacy" and isinstance(value, dict) and "a" in value:
                    value = {"b": [payload()]}  # plain pickles hold no tensors
                data = CONTAINERS[container](value, protocol)
                for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "model.ckpt",
                             "model.pt", "model.gguf", "model"):
                    path = tmp_path / name
                    path.write_bytes(data)
                    for act in OPENERS[:4] + (OPENERS[4:] if "diffusion" in name else ()):
                        with pytest.raises(CheckpointError) as caught:
                            act(path)
                        message = str(caught.value)
                        assert name in message and "\n" not in message, message
                        assert not mark.exists(), (payload, protocol, name)
                        refused += 1
                    path.unlink()
    print(f"{container}: {refused} refusals, 0 executions")
    pickle.loads(pickle.dumps(MakesFolder()))
    assert mark.is_dir()  # the control


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model.gguf"])
def test_a_refusal_says_how_to_convert(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(MARK, str(tmp_path / "executed"))
    for value in ({"a": Posix()}, {"a": torch.ones(1)}):
        torch.save(value, tmp_path / name)
        if name.endswith("ckpt") and "a" in value and isinstance(value["a"], torch.Tensor):
            assert dict(open_file(tmp_path / name).read())["a"].item() == 1
            continue
        with pytest.raises(CheckpointError, match=r"safetensors\.torch\.save_file\("):
            open_file(tmp_path / name)


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_what_torch_writes(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "strange.name"
    shared = torch.arange(12.0).view(3, 4)
    tensors = {"a": shared, "b": shared[1:, 1:3], "c": torch.arange(3), "d": torch.ones(2).bfloat16(), "e": shared.T}
    torch.save({"state_dict": tensors, "epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    file = open_file(path)
    assert {k: t.shape for k, t in file.tensors.items()} == {k: tuple(t.shape) for k, t in tensors.items()}
    for mapped in (True, False):
        for dtype in (None, torch.float16):
            found = dict(file.read(dtype=dtype, mapped=mapped))
            for name, tensor in tensors.items():
                wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
                assert found[name].dtype == wanted and torch.equal(found[name], tensor.to(wanted)), name
    assert [n for n, _ in file.read(["d", "a"])] == ["d", "a"]


_MEMORY = """
import sys
from pathlib import Path
import torch
from ldmfast.checkpoints.open_file import open_file

def stream():
    for name, tensor in file.read(dtype=torch.bfloat16, mapped=False):
        assert tensor[-1] == 1
        del tensor

path = Path(sys.argv[1])
torch.save({str(i): torch.ones(8 << 20 >> 2) for i in range(12)}, path)
torch.ones(8 << 20 >> 2).bfloat16()  # what the first call of an operator keeps
file = open_file(path)
print(resident.peak(stream))
"""


@resident.NEEDED
def test_a_stream_keeps_one_tensor(tmp_path: Path) -> None:
    """96 MB of tensors of 8 MB, converted one by one: their mapped pages are given back (they stayed, at first)."""
    grown = int(resident.fresh(_MEMORY, tmp_path / "x.ckpt"))
    print(f"a stream of 96 MiB: {grown / resident.MIB:.1f} MiB")
    assert grown <= 24 * resident.MIB, grown  # a tensor and its copy, two times
