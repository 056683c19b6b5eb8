"""CUDA C++ kernels on a machine without a GPU.

Compiled by nvcc with its report of registers and spills; their plans (which block has which numbers) compiled for and
checked on the host; and the kernels themselves run on the host, a coroutine for every CUDA thread, tensor-core and copy
instructions lane by lane as the PTX manual has them (tests/cuda_on_host). The last finds wrong indices, fragments,
descriptors and joins, missing waits and barriers; it says nothing about a GPU.
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

sys.path.insert(0, str(Path(__file__).parent))
import parity

ROOT = Path(__file__).resolve().parent.parent
# attention takes minutes to compile: its built library is read instead
SOURCES = ("group_norm_silu", "group_norm_silu_fp8", "lincomb")
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


def test_built_attention_has_no_spills() -> None:
    """In the library that setup.py built, which the tests of a checkout with nvcc have."""
    pytest.importorskip("triton", reason="triton, which brings cuobjdump, is not installed")
    library = ROOT / "ldmfast/libldmfast_cuda.so"
    if not library.exists():
        pytest.skip("the CUDA library was not built here")
    found = [r for r in resources().library_resources(library) if "mma_kernel" in r.kernel]
    for arch, kernels in (("80", {"mma"}), ("90a", {"mma", "wgmma"}), ("100a", {"mma"})):
        assert {r.kernel.split("_kernel")[0] for r in found if r.arch == arch} == kernels
    for r in found:
        assert r.stack == 0, r
        assert r.registers <= 255 if r.kernel.startswith("mma") else r.registers == 168, r


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
    assert "code=[compute_80,sm_80]" in text, "chips without code of their own (sm_103, sm_120) compile this PTX"
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
            if (op, arch) == ("attention_fp8", 80):  # which has no such products
                continue
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
    flags = ["g++", "-std=c++17", "-O1", "-fno-strict-aliasing", "-w"]
    if name == "plan_check":
        target = folder / name
        subprocess.run([*flags, f"-I{ROOT / 'csrc'}", str(ROOT / "tests/plan_check.cpp"), "-o", str(target)],
                       check=True)
        return target
    host = ROOT / "tests/cuda_on_host"
    flags += [f"-I{host}", f"-I{ROOT / 'csrc'}", "-shared", "-fPIC"]
    target = folder / f"{name}.so"
    if name == "attention":  # its kernels are headers
        subprocess.run([*flags, "-x", "c++", str(host / "attention.inc"), "-o", str(target)], check=True)
        return target
    where, end = {"group_norm_silu": ("group_norm_silu.cuh", "template <class T, class O, int V>\nvoid run("),
                  "lincomb": ("lincomb.cu", "struct Call {")}[name]
    text = (ROOT / "csrc/cuda" / where).read_text().replace("#pragma once", "")
    kernels = text[:text.index(end)]
    kernels = kernels.replace("extern __shared__ uint4 kept[];", "static uint4 kept[2048];")
    source = folder / f"{name}.cpp"
    source.write_text(kernels + (host / f"{name}.inc").read_text())
    subprocess.run([*flags, str(source), "-o", str(target)], check=True)
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
def test_e4m3_on_the_host(folder: Path) -> None:
    """The arithmetic of GPUs without the instruction: torch's codes, and saturated where torch gives NaN."""
    around = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    ties = (around[1:] + around[:-1]) / 2
    numbers = torch.cat([around, ties, ties * (1 + 2.0**-20), ties * (1 - 2.0**-20), torch.logspace(-12, 2.6, 4001)])
    x = torch.cat([numbers, -numbers, torch.tensor([449.0, 1e30, float("inf"), -float("inf"), float("nan")])]).float()
    codes = torch.empty(len(x), dtype=torch.uint8)
    ctypes.CDLL(str(built(folder, "group_norm_silu"))).run_e4m3(pointer(x), pointer(codes), ctypes.c_int64(len(x)))
    assert torch.equal(codes, x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


@needs_cxx
@pytest.mark.parametrize("name", ("one_pass_nhwc", "one_pass_scalar", "split_nhwc_straddling", "split_nchw"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_group_norm_silu_fp8_on_the_host(folder: Path, name: str, dtype: torch.dtype) -> None:
    batch, channels, pixels, groups, last, processors, offset, _ = GROUP_NORMS[name]
    generator = torch.Generator().manual_seed(len(name))
    x = (torch.randn(batch, channels, pixels, 1, generator=generator) + offset).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    bias, scale = torch.randn(channels, generator=generator), torch.tensor([0.004])
    args = (x, None, groups, None, bias, 1e-5, True, scale)
    out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    numbers = (ctypes.c_int64 * 9)(batch, channels, pixels, groups, last, dtype == torch.bfloat16, True, processors,
                                   True)
    ctypes.CDLL(str(built(folder, "group_norm_silu"))).run_group_norm_silu(
        pointer(x), pointer(out), pointer(None), pointer(None), pointer(bias), pointer(scale), ctypes.c_double(1e-5),
        numbers)
    row = ROWS["group_norm_silu_fp8"]
    assert parity.wrong_scaled_codes(row, args, dtype, out) == ""
    assert (out.float().abs() == 448).any() or "scalar" in name  # 1.8 and more: some saturate


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
                                       pointer(None), ctypes.c_double(1e-5), numbers)
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


ATTENTIONS = {  # batch, queries, keys, heads, key heads, depth, causal, mask block, warps of mma (0: wgmma)
    **{f"mma_{d}": (1, 70, 77, 1, 1, d, False, 1, 4) for d in (40, 72, 80, 160)},
    **{f"wgmma_{d}": (1, 70, 77, 1, 1, d, False, 1, 0) for d in (40, 64, 72, 80, 128, 160)},
    "mma_many_tiles": (1, 130, 333, 2, 2, 40, False, 1, 2),
    "mma_grouped_causal": (2, 45, 45, 6, 2, 80, True, 1, 1),
    "mma_block_causal": (1, 100, 100, 2, 2, 160, True, 16, 4),
    "mma_rows_without_keys": (1, 90, 24, 1, 1, 72, True, 1, 1),
    "wgmma_many_tiles": (1, 150, 700, 1, 1, 64, False, 1, 0),
    "wgmma_grouped_causal": (2, 300, 300, 2, 1, 128, True, 1, 0),
    "wgmma_block_causal": (1, 200, 500, 2, 2, 160, True, 16, 0),
    "wgmma_rows_without_keys": (1, 290, 24, 2, 2, 64, True, 1, 0),  # a block of queries with no tile at all
}


def run_attention(folder: Path, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool,
                  block: int, warps: int) -> tuple[torch.Tensor, int]:
    """In a process of its own, which a kernel whose threads wait for each other ends."""
    def layout(t: torch.Tensor) -> Any:
        return (ctypes.c_int64 * 8)(*t.shape, *t.stride())

    library = ctypes.CDLL(str(built(folder, "attention")))
    library.run_attention.restype = ctypes.c_int64
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    conflicts = library.run_attention(
        (ctypes.c_void_p * 3)(q.data_ptr(), k.data_ptr(), v.data_ptr()), layout(q), layout(k), layout(v), pointer(out),
        ctypes.c_double(scale), ctypes.c_int64(causal), ctypes.c_int64(block),
        ctypes.c_int64(q.dtype == torch.float16), ctypes.c_int64(warps))
    return out, conflicts


@needs_cxx
@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_attention_on_the_host(folder: Path, name: str, dtype: torch.dtype) -> None:
    batch, queries, keys, heads, kv_heads, depth, causal, block, warps = ATTENTIONS[name]
    generator = torch.Generator().manual_seed(len(name))
    if queries == keys and heads == kv_heads:  # read in place from one packed tensor
        q, k, v = torch.randn(batch, queries, 3, heads, depth, generator=generator).to(dtype).unbind(2)
    else:
        q = torch.randn(batch, queries, heads, depth, generator=generator).to(dtype)
        k, v = (torch.randn(batch, keys, kv_heads, depth, generator=generator).to(dtype) for _ in range(2))
    out, conflicts = run_attention(folder, 3 * q, k, v, depth**-0.5, causal, block, warps)
    oracle = ROWS["attention"].reference(3 * q.double(), k.double(), v.double(), None, depth**-0.5, causal, block)
    args = (3 * q, k, v, None, depth**-0.5, causal, block)
    low = (ROWS["attention"].peer(*args).double() - oracle).abs()
    error = (out.double() - oracle).abs()
    assert error.max() <= 2 * low[~low.isnan()].max() + torch.finfo(dtype).eps * oracle.abs().max()
    assert conflicts == 0, "rows that a warp reads together lie in one bank"


@needs_cxx
def test_attention_rows_do_not_depend_on_their_block(folder: Path) -> None:
    """A picture's result must have the same bits whatever its batch: the launcher takes other warps for it."""
    q, k, v = torch.randn(1, 90, 3, 1, 80, generator=torch.Generator().manual_seed(0)).bfloat16().unbind(2)
    one, four = (run_attention(folder, q, k, v, 80**-0.5, True, 4, warps)[0] for warps in (1, 4))
    assert torch.equal(one, four)


@needs_cxx
def test_attention_plans(folder: Path) -> None:
    """Descriptors bit by bit against the PTX manual's table; maps within the driver's limits; blocks and warps."""
    rows, columns = map(int, ask(folder, ["descriptors 4096 16384"])[0].split())
    assert rows == 4096 >> 4 | 1 << 16 | (1024 >> 4) << 32 | 1 << 62
    assert columns == 4096 >> 4 | (16384 >> 4) << 16 | (1024 >> 4) << 32 | 1 << 62
    packed, strange = ask(folder, ["map 2 4096 8 40 3932160 960 40 1 128", "map 2 4096 8 40 3932160 963 40 1 128"])
    assert packed.split() == ["1", "40", "4096", "8", "2", "1920", "80", "7864320", "64", "128", "1", "1"]
    assert strange.split()[0] == "0"
    shared = list(map(int, ask(folder, ["shared"])[0].split()))
    assert len(shared) == 10 and max(shared) <= 227 * 1024 and max(shared[:4]) <= 163 * 1024
    # SD 1.5 at 512 px: 4096 queries fill 132 multiprocessors with four warps, 256 in 16 heads need two
    assert ask(folder, ["warps 2 4096 8 32 132", "warps 2 256 8 16 132", "warps 1 3 1 32 132"]) == ["4", "2", "1"]


def test_attention_choice() -> None:
    """What the table says for the networks' calls; a call that a kernel cannot take names its reason."""
    pytest.importorskip("triton", reason="triton is not installed")
    from ldmfast.kernels import _attention_choice as table

    def choose(depth: int, chip: tuple[int, int], **more: Any) -> str:
        return table.choose(depth, more.pop("depth_v", depth), 1024, 1024, more.pop("dtype", torch.bfloat16), chip,
                            heads=more.pop("heads", 8), **more).backend

    hopper = [choose(d, (9, 0)) for d in (40, 64, 72, 80, 128, 160, 512)]
    assert hopper == ["wgmma", "sdpa", "wgmma", "wgmma", "sdpa", "wgmma", "triton"]
    assert [choose(d, (8, 0)) for d in (40, 64, 160, 256)] == ["mma", "sdpa", "mma", "triton"]
    assert [choose(d, (10, 0)) for d in (80, 128)] == ["mma", "sdpa"]
    assert choose(40, (7, 5)) == choose(40, (9, 0), built=False) == choose(40, (9, 0), readable=False) == "triton"
    assert choose(128, (9, 0), causal=True, block_size=16) == "wgmma"
    assert choose(160, (9, 0), heads=2) == "mma", "16 blocks of 128 queries: the larger kernel leaves the chip idle"
    for more in ({"biased": True}, {"dtype": torch.float32}, {"depth_v": 32}, {"scale": -1.0}):
        assert choose(40, (9, 0), **more) == "triton", more
    choice = table.choose(64, 64, 9, 9, torch.float16, (9, 0), heads=4, grouped=True, readable=False)
    assert choice.backend == "triton" and "16 bytes" in choice.reason
    packed = torch.zeros(2, 8, 3, 4, 40, dtype=torch.float16)
    assert all(table.in_place(t) for t in packed.unbind(2))
    assert not table.in_place(packed[:, :, 0, :, 1:33]) and not table.in_place(packed[:, :1, 0].expand(2, 8, 4, 40))
