"""GGUF: our reader against the gguf package, UNets in ComfyUI's layout, and every way a header can lie."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import compvis
import diffusers
import gguf_files as make
import numpy as np
import pytest
import resident
import torch

from ldmfast.checkpoints import gguf as reader
from ldmfast.checkpoints import inspect, open_single_file
from ldmfast.checkpoints.open_file import open_file
from ldmfast.errors import CheckpointError

try:
    import gguf
except ImportError:
    gguf = None
needs_gguf = pytest.mark.skipif(gguf is None, reason="the optional package gguf is not installed")

UNET = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64, "attention_head_dim": 8}


def _quantised(values: np.ndarray, kind: str) -> np.ndarray:
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])


@needs_gguf
@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_reads_what_the_package_writes(alignment: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"f32": rng.standard_normal((3, 5)).astype(np.float32), "f16": np.ones((2, 2, 3), np.float16),
              "i32": np.arange(7, dtype=np.int32), "f64": np.linspace(0, 1, 3)}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "sd1")
    writer.add_custom_alignment(alignment)
    writer.add_array("words", ["a", "bc"] * 20)
    writer.add_array("numbers", list(range(100)))
    writer.add_string("long", "x" * 100_000)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    wide = {}
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"):
        wide[kind] = rng.standard_normal((6, 64)).astype(np.float32)
        writer.add_tensor(kind, _quantised(wide[kind], kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_file(tmp_path / "x.gguf")
    assert file.metadata["general.architecture"] == "sd1" and file.metadata["general.alignment"] == str(alignment)
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for mapped in (True, False):
        found = dict(file.read(mapped=mapped))
        assert found.keys() == arrays.keys() | wide.keys()
        for name, array in arrays.items():
            assert torch.equal(found[name], torch.from_numpy(array)), name
        for kind, values in wide.items():
            expected = gguf.quants.dequantize(theirs[kind].data, theirs[kind].tensor_type)
            assert np.array_equal(found[kind].float().numpy(), expected)
            assert np.abs(expected - values).max() < 0.5 and file.tensors[kind].shape == (6, 64)
        half = dict(file.read(["Q8_0", "i32"], torch.float16, mapped=mapped))
        assert torch.equal(half["Q8_0"], found["Q8_0"].half()) and half["i32"].dtype == torch.int32


@needs_gguf
def test_every_type_that_the_package_unpacks(tmp_path: Path, monkeypatch) -> None:
    """Random blocks of every quantised type, in pieces that do not divide the tensor."""
    monkeypatch.setattr(reader, "_PIECE", 1000)
    rng = np.random.default_rng(1)
    read = 0
    for number, (kind, block, size) in reader.TYPES.items():
        assert gguf.GGMLQuantizationType[kind] == number
        if kind in reader._PLAIN or kind in ("Q8_1", "Q8_K"):
            continue
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (block, size)
        raw = rng.integers(0, 256, (17, size), np.uint8)
        (tmp_path / "x.gguf").write_bytes(make.model({"a": (number, (17, block), raw)}, []))
        found = dict(open_file(tmp_path / "x.gguf").read())["a"]
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        assert found.shape == (17, block) and np.array_equal(found.numpy(), expected, equal_nan=True), kind
        read += 1
    assert read >= 20


@needs_gguf
@pytest.mark.parametrize("names", ["compvis", "diffusers", "prefixed"])
def test_unets_in_comfyui_files(names: str, tmp_path: Path) -> None:
    """ComfyUI's files hold the UNet alone: matrices quantised, convolutions flattened so that blocks fit their rows,
    with the shape in a key, and small tensors plain."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**UNET)
    state = unet.state_dict() if names == "diffusers" else compvis.unet(unet.state_dict(), 2)
    if names == "prefixed":
        state = compvis.prefixed("model.diffusion_model.", state)
    tensors, keys, expected = {}, [("general.architecture", "sd1")], {}
    for name, tensor in state.items():
        array = tensor.numpy().astype(np.float32)
        shape = tuple(array.shape)
        if array.ndim == 4 and array.size % 256 == 0:
            keys.append((f"comfy.gguf.orig_shape.{name}", ("i", list(shape))))
            array = array.reshape(-1, 256)
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            packed = _quantised(array, "Q8_0")
            tensors[name] = (8, tuple(array.shape), packed)
            unpacked = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
            expected[name] = torch.from_numpy(unpacked).view(shape)
        elif array.ndim == 1:
            tensors[name], expected[name] = (0, tuple(array.shape), array), torch.from_numpy(array)
        else:
            tensors[name] = (1, tuple(array.shape), array.astype(np.float16))
            expected[name] = torch.from_numpy(array).half()
    path = tmp_path / "unet.gguf"
    path.write_bytes(make.model(tensors, keys))
    assert sum(t[0] == 8 for t in tensors.values()) > 100
    parts = open_single_file(path)
    assert [n for n in parts.names if n != "scheduler"] == ["unet"]
    config = parts.config("unet")
    assert tuple(config["block_out_channels"]) == UNET["block_out_channels"] and config["attention_head_dim"] == 8
    found = parts.weights("unet", torch.bfloat16)
    shapes = {k: v.shape for k, v in unet.state_dict().items()}
    assert {k: v.shape for k, v in found.items()} == shapes
    renamed = expected if names == "diffusers" else None
    if renamed is None:
        back = dict(zip(state, unet.state_dict()))
        renamed = {back[k]: v for k, v in expected.items()}
    assert all(torch.equal(found[k], v.bfloat16()) for k, v in renamed.items())
    report = str(inspect(path))
    assert "Q8_0" in report and "UNet2DConditionModel" in report


def test_without_the_package(tmp_path: Path) -> None:
    """The header is ours: a file is inspected, and plain tensors are read, without the package."""
    path = tmp_path / "x.gguf"
    tensors = {"a": (8, (1, 32), np.zeros(34, np.uint8)), "b": (0, (2,), np.ones(2, np.float32))}
    path.write_bytes(make.model(tensors, []))
    code = ("import sys; sys.modules['gguf'] = None\nfrom pathlib import Path\n"
            "from ldmfast.checkpoints.open_file import open_file\nfrom ldmfast.errors import CheckpointError\n"
            "file = open_file(Path(sys.argv[1])); print(dict(file.read(['b']))['b'].tolist())\n"
            "try:\n    dict(file.read(['b', 'a']))\nexcept CheckpointError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "[1.0, 1.0]" and "Q8_0" in second and "pip install gguf" in second


F32 = [make.info("a", (4,), 0, 0)]
DATA = b"\0" * 16
BAD = {
    "empty": (b"GGUF", "header is damaged"),
    "version": (make.file([], F32, DATA, version=1), "version 1"),
    "big-endian": (make.file([], F32, DATA, version=3 << 24), "big-endian"),
    "tensor count": (make.file([], F32, DATA, counts=(1 << 40, 0)), "1099511627776 tensors; the limit is"),
    "tensor count for the size": (make.file([], F32, DATA, counts=(100, 0)), "100 tensors; .* bytes are left"),
    "key count": (make.file([], F32, DATA, counts=(1, 1 << 63)), "9223372036854775808 keys; the limit is"),
    "key length": (make.file([("a" * 600, "x")], F32, DATA), "a key of 600 bytes, the limit is 512"),
    "key beyond": (make.file([], [struct.pack("<Q", 1 << 60)], b"\0" * 64, counts=(0, 1)), "are left in the file"),
    "empty key": (make.file([("", "x")], F32, DATA), "is empty or given twice"),
    "key twice": (make.file([("k", "x"), ("k", "y")], F32, DATA), "key 'k' is empty or given twice"),
    "not utf-8": (make.file([("k", struct.pack("<I", 8) + make.string(b"\xff\xfe"))], F32, DATA), "utf-8"),
    "value type": (make.file([("k", struct.pack("<I", 13))], F32, DATA), "has type 13"),
    "value beyond": (make.file([("k", struct.pack("<IQ", 8, 1 << 40))], F32, DATA), "are left in the file"),
    "list beyond": (make.file([("k", struct.pack("<IIQ", 9, 0, 1 << 62))], F32, DATA), "are left in the file"),
    "strings beyond": (make.file([("k", struct.pack("<IIQ", 9, 8, 1 << 18))], F32, DATA), "has 262144 strings"),
    "list of lists": (make.file([("k", struct.pack("<IIQ", 9, 9, 1))], F32, DATA), "is a list of type 9"),
    "alignment 0": (make.file([("general.alignment", ("I", 0))], F32, DATA), "general.alignment 0"),
    "alignment 24": (make.file([("general.alignment", ("I", 24))], F32, DATA), "needs a power of two"),
    "alignment text": (make.file([("general.alignment", "32")], F32, DATA), "needs a power of two"),
    "alignment true": (make.file([("general.alignment", ("?", True))], F32, DATA), "needs a power of two"),
    "huge alignment": (make.file([("general.alignment", ("I", 1 << 31))], F32, DATA), "needs a power of two"),
    "dimensions": (make.file([], [make.info("a", (1,) * 5, 0, 0)], DATA), "has 5 dimensions, the limit is 4"),
    "huge dimensions": (make.file([], [make.info("a", (1 << 62, 1 << 62), 0, 0)], DATA), "too large"),
    "huge and empty": (make.file([], [make.info("a", (0, 1 << 62, 1 << 62), 0, 0)], DATA), "too large"),
    "type": (make.file([], [make.info("a", (4,), 4, 0)], DATA), "has type 4, which is not known"),
    "row and block": (make.file([], [make.info("a", (16, 2), 8, 0)], b"\0" * 34), "has rows of 16, Q8_0 has blocks"),
    "beyond": (make.file([], [make.info("a", (5,), 0, 0)], DATA), "ends at byte 20 of the data, the file has 16"),
    "offset": (make.file([], [make.info("a", (4,), 0, 1 << 62)], DATA), "ends at byte"),
    "misaligned": (make.file([], [make.info("a", (4,), 0, 16)], DATA * 2), "not a multiple of the alignment 32"),
    "overlap": (make.file([], [*F32, make.info("b", (4,), 0, 0)], DATA), "tensor 'b' overlaps 'a'"),
    "name twice": (make.file([], [*F32, make.info("a", (4,), 0, 32)], DATA * 3), "tensor 'a' is empty or given twice"),
    "no data": (make.file([], F32), "the file has 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_file(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_every_cut_is_refused(tmp_path: Path) -> None:
    """A file that ends early is refused wherever it ends, and one that is whole is not."""
    content = make.model({"a": (8, (2, 32), np.zeros(68, np.uint8)), "b": (0, (3,), np.ones(3, np.float32))},
                         [("k", "text"), ("words", ["a", "b"]), ("n", ("I", [1, 2]))])
    whole = content[:len(content) - 20]  # what follows is padding
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    assert dict(open_file(path).read())["b"].tolist() == [1, 1, 1]
    for length in range(4, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_file(path)


_MEASURE = """
import struct, sys, time
from pathlib import Path
import gguf_files as make
from ldmfast.checkpoints.open_file import open_file
from ldmfast.errors import CheckpointError

def refuse(label):
    start = time.process_time()
    try:
        open_file(path)
    except CheckpointError:
        seconds[label] = time.process_time() - start

name = "n" * 190
worst = {
    "tensors": make.file([], [make.info(f"{name}{i:06d}", (1 << 30, 1 << 20, 1, 1), 0, 1 << 60)
                              for i in range(20_000)], b"\\0" * 64),
    "keys": make.file([(f"{i:06d}{'k' * 200}", "v" * 200) for i in range(10_000)], [], counts=(1, 10_000)),
    "strings": make.file([("k", ["abc"] * (1 << 19))], [], counts=(1, 1)),
    "text": make.file([(str(i), "v" * 60_000) for i in range(70)], [], counts=(1, 70)),
    "long text": make.file([(str(i), "v" * 6_000_000) for i in range(4)], [], counts=(1, 4)),
    "zeros": make.file([], [], b"\\0" * (64 << 20), counts=(20_000, 10_000)),
}
path, seconds = Path(sys.argv[1]), {}
for label, content in worst.items():
    path.write_bytes(content)
    grown = resident.peak(lambda: refuse(label))
    print(label.replace(" ", "_"), grown, seconds[label])
"""


@resident.NEEDED
def test_rejecting_costs_little(tmp_path: Path) -> None:
    lines = resident.fresh(_MEASURE, tmp_path / "x.gguf").splitlines()
    found = {label: (int(grown), float(s)) for label, grown, s in map(str.split, lines)}
    print({k: f"{grown / resident.MIB:.1f} MiB {s:.2f} s" for k, (grown, s) in found.items()})
    assert len(found) == 6, lines
    assert max(grown for grown, _ in found.values()) <= 32 * resident.MIB, found
