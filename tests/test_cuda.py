"""CUDA C++ kernels on a machine without a GPU.

Compiled by nvcc with its report of registers and spills; their plans (which block has which numbers) compiled for and
checked on the host; and the kernels themselves run on the host, one thread of the operating system for every CUDA
thread (tests/cuda_on_host). The last finds wrong indices, joins and missing barriers; it says nothing about a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmfast.ops import ROWS

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("group_norm_silu", "lincomb")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def resources() -> Any:
    spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "bench/cuda_resources.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source: str) -> None:
    """Every architecture: 64 registers once held the one-pass GroupNorm on sm_80 and sm_90a, and spilled on sm_100a."""
    tool = resources()
    found = tool.nvcc_resources(ROOT / f"csrc/cuda/{source}.cu", tool.NVCC_ARCHS)
    assert {r.arch for r in found} == set(tool.NVCC_ARCHS)
    for r in found:
        assert r.spills == 0 and r.stack == 0, r
        assert r.shared <= 48 * 1024, r


@needs_nvcc
@needs_cxx
def test_the_library_needs_torchs_by_name(tmp_path: Path) -> None:
    """By setup.py's rules, on an empty unit. The first CUDA library did not need libtorch_cuda.so by name, as linkers
    drop a stub that gives nothing: its first kernel on a GPU would have ended the process ("undefined symbol")."""
    spec = importlib.util.spec_from_file_location("ldmfast_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    plan = setup.Plan("cuda")
    plan.cuda()
    text, count = re.subn(r"(build libldmfast_cuda.so: nvlink ).*? \|", r"\1empty.o |", "\n".join(plan.text) + "\n")
    assert count == 1
    (tmp_path / "cuda.ninja").write_text(text)
    subprocess.run(["g++", "-c", "-fPIC", "-x", "c++", "/dev/null", "-o", str(tmp_path / "empty.o")], check=True)
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(tmp_path), "-f", "cuda.ninja", "libldmfast_cuda.so"],
                   check=True, capture_output=True)
    needed = subprocess.run(["readelf", "-d", str(tmp_path / "libldmfast_cuda.so")], text=True, capture_output=True,
                            check=True).stdout
    assert "[libtorch_cuda.so]" in needed and "[libtorch_cpu.so]" in needed


def test_committed_table_covers_every_kernel_without_spills() -> None:
    tool = resources()
    record = json.loads(tool.RESULT.read_text())
    assert record["ran_on_gpu"] is False
    for arch in tool.NVCC_ARCHS:
        mine = [k for k in record["kernels"] if k["arch"] == arch and ".cu: " in k["kernel"]]
        assert {k["kernel"].split(".cu")[0] for k in mine} == {p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")}
    for arch in tool.TRITON_ARCHS:
        mine = [k["kernel"] for k in record["kernels"] if k["arch"] == str(arch) and ".py: " in k["kernel"]]
        for op, name, _ in tool.triton_calls():
            assert any(k.startswith(f"{op}.py: ") and k.endswith(f"({name})") for k in mine), (op, name, arch)
    assert not [k for k in record["kernels"] if k["spills"]]


def test_report_parser_sees_spills() -> None:
    """The gate is only as good as its reader: a report with spills, as ptxas writes it."""
    report = ("ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'\nptxas info    : Function properties for "
              "_Z1kv\n    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads\nptxas info    : Used 40 "
              "registers, used 1 barriers, 8 bytes cumulative stack size, 96 bytes smem\n")
    found, = resources().parse_ptxas(report)
    assert (found.arch, found.registers, found.shared, found.stack, found.spills) == ("90a", 40, 96, 8, 32)


@cache
def built(folder: Path, name: str) -> Path:
    flags = ["g++", "-std=c++17", "-O1", "-pthread", "-fno-strict-aliasing", "-w"]
    if name == "plan_check":
        target = folder / name
        subprocess.run([*flags, f"-I{ROOT / 'csrc'}", str(ROOT / "tests/plan_check.cpp"), "-o", str(target)],
                       check=True)
        return target
    text = (ROOT / f"csrc/cuda/{name}.cu").read_text()
    kernels = text[:text.index({"group_norm_silu": "template <class T, int V>\nvoid run(",
                                "lincomb": "struct Call {"}[name])]
    kernels = kernels.replace("extern __shared__ uint4 kept[];", "static uint4 kept[2048];")
    source = folder / f"{name}.cpp"
    host = ROOT / "tests/cuda_on_host"
    source.write_text(kernels + (host / f"{name}.inc").read_text())
    target = folder / f"{name}.so"
    subprocess.run([*flags, "-shared", "-fPIC", f"-I{host}", f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)],
                   check=True)
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


def ask(folder: Path, questions: list[str]) -> list[str]:
    done = subprocess.run([str(built(folder, "plan_check"))], input="\n".join(questions) + "\n", text=True,
                          capture_output=True, check=True)
    return done.stdout.splitlines()


@needs_cxx
def test_division_by_multiplication(folder: Path) -> None:
    generator = random.Random(0)
    divisors = [1, 2, 3, 5, 7, 10, 40, 641, 4095, 4096, 65537, 2**31 - 1] + [generator.randrange(1, 2**31)
                                                                            for _ in range(500)]
    pairs = [(d, x) for d in divisors for x in (0, 1, d - 1, d, 2**31 - 1, 2**31 - 2, generator.randrange(2**31))]
    answers = ask(folder, [f"divide {d} {x}" for d, x in pairs])
    assert [int(a) for a in answers] == [x // d for d, x in pairs]


PLANS = [(batch, channels, pixels, groups, last, size, aligned)
         for channels, groups in ((320, 32), (1280, 32), (93, 31), (37, 37), (24, 1), (2100, 1), (48, 4))
         for pixels in (1, 5, 77) for last in (0, 1) for size in (2, 4, 8) for aligned in (0, 1)
         for batch in (1, 2)]


@needs_cxx
def test_every_element_belongs_to_one_piece(folder: Path) -> None:
    """The pieces of all groups cover the tensor once, and their counts and partial slots are right."""
    for plan, line in zip(PLANS, ask(folder, ["runs " + " ".join(map(str, p)) + " 132" for p in PLANS])):
        batch, channels, pixels, groups, last, _, aligned = plan
        head, _, tiles = line.partition(" /")
        one_pass, vector, splits, piece, _, tile_count, blocks = map(int, head.split(" | ")[0].split())
        seen = torch.zeros(batch * channels * pixels, dtype=torch.int64)
        slots = []
        for part in head.split(" | ")[1:]:
            slot, count, *runs = map(int, part.split())
            slots.append(slot)
            assert count == sum(runs[1::2]) > 0
            for start, length in zip(runs[::2], runs[1::2]):
                seen[start:start + length] += 1
        assert (seen == 1).all(), plan
        assert sorted(slots) == list(range(batch * groups * splits)), plan
        assert vector == 1 or aligned, plan
        assert piece % vector == 0 or last, plan
        if last and not one_pass:
            ends = [tuple(map(int, t.split())) for t in tiles.split("/")]
            assert [g for a, b in ends for g in range(a, b)] == list(range(groups)), plan
            assert all(a * (channels // groups) % vector == 0 for a, _ in ends), plan
        assert blocks == batch * (groups if one_pass else splits * (tile_count if last else groups)), plan


@needs_cxx
def test_large_groups_fill_the_chip_whatever_the_batch(folder: Path) -> None:
    """A 512-channel 256x256 picture in 32 groups: more blocks than multiprocessors; the batch changes no split."""
    one, four = (list(map(int, a.split())) for a in ask(folder, [f"plan {n} 512 65536 32 1 2 1 132" for n in (1, 4)]))
    assert one[:6] == four[:6] and four[6] == 4 * one[6] >= 4 * 4 * 132
    far, = ask(folder, ["runs 3 4 1073741824 2 0 2 1 132"])  # 12.9e9 elements: offsets need 64 bits
    assert f" {2 * 4 * 2**30 + 2 * 2**30} " in far


@needs_cxx
def test_step_table(folder: Path) -> None:
    """A coefficient that is zero in fp32 drops its column; the others keep their order."""
    answer, split = ask(folder, ["lincomb 3 9 2 5 0.5 0 -2 1e-60 4", "split 1003 8"])
    indices, kept = answer.split("|")
    assert list(map(int, indices.split())) == [3 * 9 + 2 * j for j in range(5)]
    assert kept.split() == ["0", "0.5", "2", "-2", "4", "4"]
    assert split.split() == ["125", "1000", "3"]


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def within(row: Any, args: tuple, out: torch.Tensor) -> None:
    """DESIGN 6: twice the error of the low-precision reference, and one rounding of the result."""
    oracle = row.reference(*(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else
                             [t.double() for t in a] if isinstance(a, list) else a for a in args))
    low = (row.reference(*args).double() - oracle).abs().max()
    assert ((out.double() - oracle).abs() <= 2 * low + torch.finfo(out.dtype).eps * oracle.abs()).all()


# name: batch, channels, pixels, groups, channels-last, processors, offset, expected way (1: one pass, 2: one split,
# 3: several splits)
GROUP_NORMS = {
    "one_pass_nhwc": (2, 64, 9, 4, 1, 4, 0.3, 1),
    "one_pass_nchw": (2, 16, 24, 4, 0, 4, 0.3, 1),
    "one_pass_scalar": (1, 21, 11, 7, 1, 4, 0.3, 1),
    "one_pass_far_mean": (1, 32, 64, 4, 1, 4, 30.0, 1),
    "split_nhwc": (2, 40, 900, 2, 1, 4, 0.3, 3),
    "split_nhwc_straddling": (1, 24, 2000, 8, 1, 2, 0.3, 3),
    "split_nhwc_scalar": (1, 21, 1100, 3, 1, 2, 0.3, 3),
    "split_nhwc_far_mean": (1, 16, 5000, 2, 1, 2, 30.0, 3),
    "wide_group": (1, 2200, 3, 1, 1, 2, 0.3, 2),
    "split_nchw": (1, 6, 4000, 2, 0, 4, 0.3, 3),
    "split_nchw_scalar": (1, 6, 3001, 2, 0, 2, 0.3, 3),
}


@needs_cxx
@pytest.mark.parametrize("name", GROUP_NORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_group_norm_silu_on_the_host(folder: Path, name: str, dtype: torch.dtype) -> None:
    batch, channels, pixels, groups, last, processors, offset, way = GROUP_NORMS[name]
    generator = torch.Generator().manual_seed(len(name))
    x = (torch.randn(batch, channels, pixels, 1, generator=generator) + offset).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    shift = torch.randn(batch, channels, generator=generator)
    weight, bias = torch.randn(channels, generator=generator), torch.randn(channels, generator=generator)
    if "scalar" in name:
        shift = weight = None
    out = torch.full_like(x, float("nan"))
    library = ctypes.CDLL(str(built(folder, "group_norm_silu")))
    numbers = (ctypes.c_int64 * 9)(batch, channels, pixels, groups, last, dtype == torch.bfloat16, True, processors,
                                   "nchw" not in name)
    took = library.run_group_norm_silu(pointer(x), pointer(out), pointer(shift), pointer(weight), pointer(bias),
                                       ctypes.c_double(1e-5), numbers)
    within(ROWS["group_norm_silu"], (x, shift, groups, weight, bias, 1e-5, "nchw" not in name), out)
    assert took == way or dtype == torch.bfloat16


@needs_cxx
@pytest.mark.parametrize("kinds, vector", [("fff", 1), ("bbbb", 1), ("bff", 0), ("fbfbfbfbf", 0)])
def test_lincomb_on_the_host(folder: Path, kinds: str, vector: int) -> None:
    generator = torch.Generator().manual_seed(3)
    count, elements = len(kinds), 2 * 256 * 8 + 803
    table = torch.randn(2 * count, 5, dtype=torch.float64, generator=generator).t()[:, ::2]
    row = torch.tensor(3)
    table[3, 1] = 0
    dtypes = [torch.bfloat16 if k == "b" else torch.float32 for k in kinds]
    inputs = [torch.randn(elements, generator=generator).to(d) for d in dtypes]
    inputs[1].fill_(float("inf"))
    out = torch.full_like(inputs[0], float("nan"))
    library = ctypes.CDLL(str(built(folder, "lincomb")))
    library.run_lincomb(pointer(table), ctypes.c_int64(table.stride(0)), ctypes.c_int64(table.stride(1)), pointer(row),
                        (ctypes.c_void_p * count)(*(t.data_ptr() for t in inputs)),
                        (ctypes.c_int64 * count)(*(k == "b" for k in kinds)), ctypes.c_int64(count),
                        ctypes.c_int64(vector), pointer(out), ctypes.c_int64(elements), ctypes.c_int64(2))
    within(ROWS["lincomb"], (table, row, inputs), out)
