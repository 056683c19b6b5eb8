"""Registers, shared memory and spills of every GPU kernel, from compilers alone: no GPU is needed, nothing is run.

    python bench/cuda_resources.py --write     # bench/results/compile/cuda_resources.json

CUDA C++ is compiled by nvcc with ``-Xptxas -v``. Triton kernels are compiled to cubin with the very arguments and
configuration their launcher chooses for a network's shapes (meta tensors), and read back with cuobjdump.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench/results/compile/cuda_resources.json"
NVCC_ARCHS = ("80", "90a", "100a")
TRITON_ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use, CUDA programming guide


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. spills: bytes of spill stores and loads; stack: bytes of local memory."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int


def nvcc_command(source: Path, archs: tuple[str, ...], target: Path) -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return ["nvcc", "-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA",
            "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-isystem", str(include),
            *(part for a in archs for part in ("-gencode", f"arch=compute_{a},code=sm_{a}")),
            "-Xptxas", "-v", "-c", str(source), "-o", str(target)]


def parse_ptxas(report: str) -> list[Resources]:
    """Reads the lines that ``ptxas -v`` prints for every entry function."""
    found = []
    entries = re.split(r"Compiling entry function ", report)[1:]
    for entry in entries:
        name, arch = re.match(r"'(\S+)' for 'sm_(\w+)'", entry).groups()
        stack, stores, loads = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups())
        registers = int(re.search(r"Used (\d+) registers", entry).group(1))
        shared = re.search(r"(\d+) bytes smem", entry)
        found.append(Resources(name, arch, registers, int(shared.group(1)) if shared else 0, stack, stores + loads))
    return found


def demangled(found: list[Resources]) -> list[Resources]:
    """Readable kernel names: namespace and parameter list taken off."""
    if not found or shutil.which("c++filt") is None:
        return found
    names = subprocess.run(["c++filt"], input="\n".join(r.kernel for r in found), text=True, capture_output=True,
                           check=True).stdout.splitlines()
    short = [re.sub(r"\(.*$|^void |ldmfast::cuda::|\(anonymous namespace\)::", "",
                    n.replace("(anonymous namespace)::", "").replace("(int)", "").replace("(bool)", ""))
             for n in names]
    return [Resources(**{**asdict(r), "kernel": n}) for r, n in zip(found, short)]


def empty_there(r: Resources) -> bool:
    """Kernels for the instructions of sm_90a alone are compiled for the others without a body."""
    return "wgmma" in r.kernel and r.arch != "90a"


def library_resources(library: Path) -> list[Resources]:
    """Of the kernels in a built library, which takes seconds. cuobjdump gives no spill count: these kernels keep no
    arrays in local memory, so their whole stack frame is spills."""
    found, arch, name = [], "", ""
    report = usage(library)
    for line in report.splitlines():
        if match := re.match(r"\s*arch = sm_(\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function (\S+?):", line):
            name = match.group(1)
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            found.append(Resources(name, arch, registers, shared, stack + local, stack + local))
    return [r for r in demangled(found) if not empty_there(r)]


def usage(path: str | Path) -> str:
    """What cuobjdump, which Triton brings, says of a cubin or library."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([str(tool), "-res-usage", str(path)], text=True, capture_output=True, check=True).stdout


def nvcc_resources(source: Path, archs: tuple[str, ...]) -> list[Resources]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(nvcc_command(source, archs, Path(folder) / "out.o"), text=True,
                              capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for {archs}:\n{done.stderr[-3000:]}")
    if "wgmma.mma_async instructions are serialized" in done.stderr:  # registers touched while products are in flight
        raise RuntimeError(f"{source.name} waits for every single wgmma:\n{done.stderr[-3000:]}")
    found = [r for r in demangled(parse_ptxas(done.stderr)) if not empty_there(r)]
    return [Resources(**{**asdict(r), "kernel": f"{source.stem}.cu: {r.kernel}"}) for r in found]


@dataclass(frozen=True)
class Launch:
    """One kernel call, caught before it compiles."""

    function: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def catch(launch: Callable[[], Any]) -> list[Launch]:
    """Runs a launcher on meta tensors and returns the kernel calls it would make."""
    from triton.runtime import JITFunction

    caught = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in kwargs}
        bound = self.signature.bind(*args, **kwargs)
        caught.append(Launch(self, dict(bound.arguments), options))

    original, JITFunction.run = JITFunction.run, run
    try:
        launch()
    finally:
        JITFunction.run = original
    return caught


POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
            torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8",
            torch.float8_e4m3fn: "*fp8e4nv"}


def _specialise(value: Any, path: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """Type of one argument as Triton's own launcher sees it: 1 and None are constants, multiples of 16 are known."""
    divisible = [["tt.divisibility", 16]]
    if isinstance(value, (tuple, list)):
        return tuple(_specialise(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    if isinstance(value, torch.Tensor):
        if value.storage_offset() * value.element_size() % 16 == 0:
            attributes[path] = divisible
        return POINTERS[value.dtype]
    if value is None or value is True or value is False or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0:
        attributes[path] = divisible
    return "i32" if -2**31 <= value < 2**31 else "i64"


def compile_triton(call: Launch, arch: int) -> Any:
    """The compiled kernel (metadata and cubin) of a caught call for sm_<arch>."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(call.function.params):
        value = call.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = _specialise(value, (index,), constants, attributes)
    source = ASTSource(call.function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=call.options)


def cubin_resources(name: str, arch: int, compiled: Any) -> Resources:
    """cuobjdump gives no spill count: Triton keeps no arrays in local memory, so its whole stack frame is spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = usage(file.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", report).group(1)) for key in ("REG", "STACK"))
    return Resources(name, str(arch), registers, compiled.metadata.shared, stack, stack)


def attention_arguments(queries: int, keys: int, heads: int, depth: int, dtype: torch.dtype = torch.bfloat16, *,
                        causal: bool = False, bias: bool = False, packed: bool = True) -> tuple:
    if packed and queries == keys:
        q, k, v = torch.empty(2, queries, 3, heads, depth, dtype=dtype, device="meta").unbind(2)
    else:
        q, k, v = (torch.empty(2, t, heads, depth, dtype=dtype, device="meta") for t in (queries, keys, keys))
    extra = torch.empty(2, 1, 1, keys, dtype=dtype, device="meta") if bias else None
    return q, k, v, extra, depth**-0.5, causal, 1


def triton_calls() -> Iterator[tuple[str, str, tuple]]:
    """(op, name, launch arguments) with the shapes of SD 1.5, SDXL, their autoencoder, FLUX, SD 3 and T5."""
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16, last: bool = False) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device="meta")
        return x.contiguous(memory_format=torch.channels_last) if last else x

    for depth, tokens, heads in ((40, 4096, 8), (64, 4096, 10), (72, 1024, 16), (80, 1024, 8), (96, 1024, 16),
                                 (128, 4096, 24), (160, 256, 8), (256, 1024, 4), (512, 4096, 1)):
        yield "attention", f"d{depth}", attention_arguments(tokens, tokens, heads, depth)
    yield "attention", "d64 causal", attention_arguments(77, 77, 12, 64, torch.float16, causal=True, packed=False)
    yield "attention", "d40 cross bias", attention_arguments(4096, 77, 8, 40, torch.float16, bias=True)
    yield "attention", "d40 fp32", attention_arguments(4096, 4096, 8, 40, torch.float32)
    yield "attention", "d160 fp32", attention_arguments(256, 256, 8, 160, torch.float32)
    yield "attention", "d512 fp32", attention_arguments(4096, 4096, 1, 512, torch.float32)
    for depth, tokens, heads in ((40, 4096, 8), (64, 4096, 10), (80, 1024, 8), (128, 4096, 24), (160, 256, 8)):
        q, k, v, _, *rest = attention_arguments(tokens, tokens, heads, depth)
        yield "attention_fp8", f"d{depth}", (q, k, v, *rest)
    c = [meta(c) for c in (320, 1280, 512)]
    yield "group_norm_silu", "one pass", (meta(2, 1280, 16, 16, last=True), meta(2, 1280), 32, c[1], c[1], 1e-5, True)
    yield "group_norm_silu", "split", (meta(2, 320, 64, 64, last=True), meta(2, 320), 32, c[0], c[0], 1e-5, True)
    yield "group_norm_silu", "split vae fp32", (meta(1, 512, 512, 512, dtype=torch.float32, last=True), None, 32,
                                               c[2], c[2], 1e-6, True)
    yield "group_norm_silu", "split nchw", (meta(2, 320, 64, 64), None, 32, c[0], c[0], 1e-5, True)
    code_scale = meta(1, dtype=torch.float32)
    yield "group_norm_silu_fp8", "one pass", (meta(2, 1280, 16, 16, last=True), meta(2, 1280), 32, c[1], c[1], 1e-5,
                                              True, code_scale)
    yield "group_norm_silu_fp8", "split", (meta(2, 320, 64, 64, last=True), meta(2, 320), 32, c[0], c[0], 1e-5, True,
                                           code_scale)
    yield "layer_norm_modulate", "c1280", (meta(2, 256, 1280), None, None, c[1], c[1], 1e-5)
    yield "layer_norm_modulate", "c1152 modulated", (meta(2, 256, 1152), meta(2, 1152), meta(2, 1152), None, None, 1e-6)
    yield "layer_norm_modulate_rows", "fp8 c1280", (meta(2, 256, 1280), None, None, c[1], c[1], 1e-5, True)
    yield "layer_norm_modulate_rows", "int8 c3072", (meta(1, 4608, 3072), meta(1, 3072), meta(1, 3072), None, None,
                                                     1e-6, False)
    yield "geglu_rows", "fp8 c1280", (meta(2, 4096, 2560), True)
    yield "geglu_rows", "fp8 c5120", (meta(2, 1024, 10240), True)
    yield "geglu", "c1280", (meta(2, 4096, 2560),)
    yield "geglu_tanh", "c10240", (meta(1, 512, 20480),)
    yield "swiglu", "c3072", (meta(1, 256, 6144),)
    yield "philox_normal", "sdxl", (meta(1, 2, dtype=torch.int64), 4 * 128 * 128, 132 * 2048)
    yield "quantize_rowwise", "int8 c3072", (meta(1, 4608, 3072), False)
    yield "quantize_rowwise", "fp8 c12288", (meta(1, 4608, 12288), True)
    yield "rms_norm", "c4096", (meta(1, 512, 4096), meta(4096), 1e-6)
    yield "rms_norm", "c10240", (meta(1, 512, 10240), None, 1e-6)
    yield "gate_residual", "c3072", (meta(1, 1024, 3072), meta(1, 1024, 3072), meta(1, 3072))
    flux, text, w = meta(1, 4096, 3, 24, 128), meta(1, 512, 3, 24, 128), [meta(128)] * 4
    angles = [meta(t, 64, dtype=torch.float32) for t in (4096, 4608)]
    yield "qk_norm_rope", "flux joint", (flux, text, *w, angles[1], angles[1], True, 1e-6)
    yield "qk_norm_rope", "flux single", (flux, None, *w[:2], None, None, angles[0], angles[0], True, 1e-6)
    yield "qk_norm_rope", "halves", (flux, None, *w[:2], None, None, angles[0], angles[0], False, 1e-6)
    yield "qk_norm_rope", "sd3 join", (meta(2, 4096, 3, 24, 64), meta(2, 333, 3, 24, 64), *[None] * 6, True, None)
    cache, places = meta(1, 32760, 2, 12, 128), meta(1, 1560, dtype=torch.int64)
    yield "kv_append", "ring", (cache, meta(1, 1560, 2, 12, 128), places, True)
    yield "kv_gather", "beams", (cache.expand(4, *cache.shape[1:]), places, meta(4, dtype=torch.int64), False)
    yield "upsample2x", "nhwc", (meta(2, 640, 32, 32, last=True),)
    yield "upsample2x", "nchw", (meta(2, 640, 32, 32),)
    table, row = meta(20, 4, dtype=torch.float64), meta(1, dtype=torch.int64)[0]
    yield "lincomb", "4 inputs", (table, row, [meta(1, 4, 128, 128) for _ in range(4)])
    yield "lincomb", "2 inputs mixed", (table[:, :2], None, [meta(1, 4, 64, 64), meta(1, 4, 64, 64,
                                                                                  dtype=torch.float32)])


def triton_resources(op: str, name: str, arguments: tuple, arch: int) -> list[Resources]:
    """Nothing where the op does not run on that chip."""
    if op == "attention_fp8" and arch < 89:
        return []
    module = importlib.import_module(f"ldmfast.kernels.{op}")
    asked = getattr(module, "shared_memory", None)
    if asked is not None:
        module.shared_memory = lambda x: SHARED_LIMIT[arch]
    try:
        calls = catch(lambda: module.launch(*arguments))
    finally:
        if asked is not None:
            module.shared_memory = asked
    return [cubin_resources(f"{op}.py: {call.function.fn.__name__} ({name})", arch, compile_triton(call, arch))
            for call in calls]


def collect() -> list[Resources]:
    found = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        found += nvcc_resources(source, NVCC_ARCHS)
    for arch in TRITON_ARCHS:
        for op, name, arguments in triton_calls():
            found += triton_resources(op, name, arguments, arch)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        print("nvcc is not installed")
        return 1
    import triton

    found = collect()
    for r in found:
        print(f"sm_{r.arch:5} {r.registers:4} registers {r.shared:7} B shared {r.spills:4} B spilled  {r.kernel}")
    if options.write:
        version = subprocess.run(["nvcc", "--version"], text=True, capture_output=True).stdout.splitlines()[-2]
        record = {"made_by": "python bench/cuda_resources.py --write", "ran_on_gpu": False,
                  "nvcc": version.split(", ")[-1], "triton": triton.__version__, "kernels": [asdict(r) for r in found]}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(r.spills for r in found))


if __name__ == "__main__":
    sys.exit(main())
