"""The safetensors reader: equal to the reference implementation on good files, one line and little memory on bad."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import resident
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldmfast.checkpoints import inspect
from ldmfast.checkpoints import safetensors as reader
from ldmfast.checkpoints.open_file import open_file
from ldmfast.errors import CheckpointError

TENSORS = {
    "a.weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4), "b": torch.tensor(5, dtype=torch.int64),
    "c": torch.linspace(-3, 3, 7).bfloat16(), "d": torch.tensor([True, False, True]), "empty": torch.zeros(0, 3),
    "half": torch.linspace(0, 1, 5).half(), "fp8": torch.linspace(-1, 1, 4).to(torch.float8_e4m3fn),
    "bytes": torch.arange(3, dtype=torch.uint8), "später/ñ": torch.ones(2, dtype=torch.float64),
}


def good(folder: Path, metadata: dict[str, str] | None = None) -> Path:
    path = folder / "good.safetensors"
    safetensors.torch.save_file(TENSORS, path, metadata)
    return path


def raw(folder: Path, header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "made.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    path = good(tmp_path, {"format": "pt", "note": "ü" * 70000})
    header = reader.read_header(path)
    assert header.metadata == {"format": "pt", "note": "ü" * 70000}
    expected = safetensors.torch.load_file(path)
    found = dict(reader.load(path))
    assert found.keys() == expected.keys() == header.tensors.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())  # fp8 has no comparison of its own


def test_conversion_touches_floating_tensors_only(tmp_path: Path) -> None:
    found = dict(reader.load(good(tmp_path), torch.float16))
    assert torch.equal(found["c"], TENSORS["c"].half()) and torch.equal(found["half"], TENSORS["half"])
    assert found["b"].dtype == torch.int64 and found["d"].dtype == torch.bool
    assert found["fp8"].dtype == torch.float16 and found["empty"].dtype == torch.float16


def test_kept_dtypes_are_mapped(tmp_path: Path) -> None:
    """Tensors of one file share its mapping and may be written to without changing the file."""
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1000), "b": torch.ones(1000)}, path)
    before = path.read_bytes()
    found = dict(reader.load(path))
    assert found["b"].data_ptr() - found["a"].data_ptr() == 4000
    found["a"].add_(5)
    assert path.read_bytes() == before
    only = dict(reader.load(path, names=["b"]))
    assert list(only) == ["b"]


def test_misaligned_data_is_copied(tmp_path: Path) -> None:
    """A header length that is not a multiple of 8 leaves the data misaligned; vector code must not see that."""
    text = json.dumps({"a": entry(shape=[2], offsets=[0, 8])}).encode()
    path = raw(tmp_path, text + b" " * ((1 - len(text)) % 4), torch.tensor([1.5, 2.5]).numpy().tobytes())
    tensor = dict(reader.load(path))["a"]
    assert tensor.tolist() == [1.5, 2.5] and tensor.data_ptr() % 4 == 0


BAD: dict[str, tuple[Any, str]] = {
    "overlap": (({"a": entry(), "b": entry(offsets=(2, 6))}, b"\0" * 6), "overlaps 'a'"),
    "hole": (({"a": entry(), "b": entry(offsets=(8, 12))}, b"\0" * 12), "leaves a hole after 'a'"),
    "late start": (({"a": entry(offsets=(4, 8))}, b"\0" * 8), "leaves a hole after 'the start'"),
    "beyond the end": (({"a": entry()}, b"\0" * 3), "ends at byte 4 of the data, the file has 3"),
    "appended": (({"a": entry()}, b"\0" * 5), "tensors end at byte 4 of the data, the file has 5"),
    "wrong size": (({"a": entry(shape=(2,))}, b"\0" * 4), "needs 8 bytes and has 4"),
    "negative": (({"a": entry(shape=(-1,))}, b"\0" * 4), "not a whole number"),
    "float shape": (({"a": entry(shape=(1.0,))}, b"\0" * 4), "not a whole number"),
    "boolean shape": (({"a": entry(shape=(True,))}, b"\0" * 4), "not a whole number"),
    "backwards": (({"a": entry(offsets=(4, 0))}, b"\0" * 4), "needs 4 bytes and has -4"),
    "huge numbers": (({"a": entry(shape=[1 << 61] * 16)}, b""), "needs"),
    "many dimensions": (({"a": entry(shape=[1] * 17)}, b"\0" * 4), "17 dimensions"),
    "three offsets": (({"a": entry(offsets=(0, 4, 8))}, b"\0" * 4), "3 offsets"),
    "dtype": (({"a": entry("F31")}, b"\0" * 4), "dtype 'F31'"),
    "dtype kind": (({"a": entry(7)}, b"\0" * 4), "dtype '7'"),  # type: ignore[arg-type]
    "missing key": (({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "does not have exactly"),
    "extra key": (({"a": entry() | {"more": 1}}, b"\0" * 4), "does not have exactly"),
    "not an object": (({"a": 5}, b""), "does not have exactly"),
    "metadata number": (({"__metadata__": {"a": 5}}, b""), "metadata 'a' is not one string"),
    "metadata list": (({"__metadata__": []}, b""), r"expected '{'"),
    "duplicate": ((b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                   b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4), "tensor 'a' is given twice"),
    "duplicate inside": ((b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
                         "a key is given twice"),
    "duplicate metadata": ((b'{"__metadata__":{},"__metadata__":{}}', b""), "__metadata__ is given twice"),
    "cut json": ((b'{"a":{"dtype":"F32","shape":[1],"data_off', b"\0" * 4), "header is damaged"),
    "two values": ((b"{}{}", b""), "text after its end"),
    "comma": ((b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},}', b"\0" * 4), "a comma before"),
    "no colon": ((b'{"a" 5}', b""), "expected ':'"),
    "not utf-8": ((b'{"\xff\xfe":5}', b""), "not UTF-8"),
    "nested": ((b'{"a":' + b"[" * 60000 + b"}", b""), "header is damaged"),
    "long number": ((b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', b"\0" * 4),
                    "header is damaged"),
    "list": ((b'["a"]', b""), "does not start with '{'"),
    "long name": ((b'{"' + b"a" * 70000 + b'":5}', b""), "header is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers(name: str, tmp_path: Path) -> None:
    (header, data), message = BAD[name]
    path = raw(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        reader.read_header(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, message", [
    (b"", "has 0 bytes"), (b"\x02\0\0\0\0\0\0\0", "has 8 bytes"),
    ((1 << 40).to_bytes(8, "little") + b"{}" * 20, "claims a header of 1099511627776 bytes, the limit"),
    ((5000).to_bytes(8, "little") + b"{}" * 20, "claims a header of 5000 bytes, the file has 40"),
    (b"GGUF" + b"\0" * 40, "a GGUF file"), (b"<!DOCTYPE html><html>" + b" " * 40, "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    (pickle.dumps({"a": list(range(50))}), "a Python pickle"),
])
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        reader.read_header(path)


def test_renamed_torch_file_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"a": torch.ones(1)}, path)
    assert zipfile.is_zipfile(path)
    with pytest.raises(CheckpointError, match=r"a zip archive \(a PyTorch pickle\?\)"):
        reader.read_header(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.read_header(tmp_path)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    return folder / "fuzz.safetensors", good(folder, {"format": "pt"}).read_bytes()


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2000), st.sampled_from(["set", "cut", "insert", "swap"]),
                                st.binary(min_size=1, max_size=4)), min_size=1, max_size=4))
def test_mutated_files_are_read_or_refused(sample: tuple[Path, bytes], edits: list) -> None:
    """Whatever is changed: either the header still describes the file exactly, or one CheckpointError."""
    path, content = sample
    data = bytearray(content)
    for at, kind, new in edits:
        at %= max(len(data), 1)
        if kind == "set":
            data[at:at + len(new)] = new
        elif kind == "cut":
            del data[at:at + 8 * new[0]]
        elif kind == "insert":
            data[at:at] = new
        else:
            data[at:at + 2] = data[at:at + 2][::-1]
    path.write_bytes(bytes(data))
    try:
        tensors = dict(reader.load(path))
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        header = reader.read_header(path)
        assert sum(e.nbytes for e in header.tensors.values()) == path.stat().st_size - header.data
        assert all(tensors[k].numel() * tensors[k].element_size() == e.nbytes for k, e in header.tensors.items())


_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                     lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3))
_ENTRY = st.fixed_dictionaries({
    "dtype": st.sampled_from([*reader.DTYPES, "F4"]) | _JSON,
    "shape": st.lists(st.integers(-1, 4), max_size=3) | _JSON,
    "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | _JSON})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), _ENTRY | _JSON, max_size=4),
       size=st.integers(0, 64))
def test_made_up_headers_are_read_or_refused(sample: tuple[Path, bytes], header: dict, size: int) -> None:
    text = json.dumps(header).encode()
    path = sample[0]
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
    try:
        dict(reader.load(path))
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)


_MEASURE = """
import json, sys
from itertools import chain
from pathlib import Path
from ldmfast.checkpoints import inspect
from ldmfast.checkpoints import safetensors as reader
from ldmfast.checkpoints.open_file import open_file
from ldmfast.errors import CheckpointError

folder = Path(sys.argv[1])
limit = reader.MAX_HEADER

def write(name, length, parts, size=None):
    path = folder / f"{name}.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        for part in parts:
            file.write(part)
        if size is not None:
            file.truncate(size)
    return path

entry = b'"%08d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
note = b'"%08d":"%01000d",'

def thousand(text, i):
    return b"".join(text % ((i * 1000 + j, 0) if text is note else i * 1000 + j) for j in range(1000))

def mega(text):
    return (text * (1_000_000 // len(text)) for _ in range(100))

files = {
    "truncated": (400, [json.dumps({"a": {"dtype": "F32", "shape": [100_000_000],
                  "data_offsets": [0, 400_000_000]}}).encode().ljust(400)], 300_000_000),
    "zeros": (limit, [b"{"], limit + 100),
    "spaces": (limit, chain([b"{"], mega(b" ")), limit + 100),
    "many": (limit, chain([b"{"], (thousand(entry, i) for i in range(limit // 60_000))), limit + 100),
    "string": (limit, chain([b'{"'], mega(b"a")), limit + 100),
    "metadata": (limit, chain([b'{"__metadata__":{"a":"'], mega(b"a")), limit + 100),
    "notes": (limit, chain([b'{"__metadata__":{'], (thousand(note, i) for i in range(98))), limit + 100),
    "brackets": (limit, chain([b'{"a":'], mega(b"[")), limit + 100),
    "escapes": (limit, chain([b'{"a":"'], mega(b"\\u00e9")), limit + 100),
}
def refuse(path):
    try:
        reader.read_header(path)
    except CheckpointError as error:
        assert "\\n" not in str(error)
    else:
        raise SystemExit(f"{path} was accepted")

for name, content in files.items():
    path = write(name, *content)
    print(name, resident.peak(lambda: refuse(path)))
    path.unlink()
"""


@resident.NEEDED
def test_rejecting_costs_little_memory(tmp_path: Path) -> None:
    """Truncated data, and headers of the format's full 100 MB with every kind of filling: each costs at most
    32 MiB more than was resident before.
    """
    grown = {line.split()[0]: int(line.split()[1]) for line in resident.fresh(_MEASURE, tmp_path).splitlines()}
    print({k: f"{v / resident.MIB:.1f} MiB" for k, v in grown.items()})
    assert len(grown) == 9 and max(grown.values()) <= 32 * resident.MIB, grown


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    """Opening one without a writer never returned."""
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)
    for call in (reader.read_header, open_file, inspect):
        with pytest.raises(CheckpointError, match="is a pipe, a socket or a device"):
            call(pipe)
