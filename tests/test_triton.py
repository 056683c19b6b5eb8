"""Triton kernels on a machine without a GPU: numbers through Triton's interpreter, code through its compiler.

The interpreter replaces ``triton.jit`` when a kernel is imported, so it runs in a process of its own: this file called
as a script, which prints one JSON line for each case. None of this says how a kernel behaves on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

sys.path.insert(0, str(Path(__file__).parent))
import parity

ROOT = Path(__file__).resolve().parent.parent
OPS = ("attention", "attention_fp8", "gate_residual", "geglu", "geglu_rows", "geglu_tanh", "group_norm_silu",
       "group_norm_silu_fp8", "kv_append", "kv_gather", "layer_norm_modulate", "layer_norm_modulate_rows", "lincomb",
       "philox_normal", "qk_norm_rope", "quantize_rowwise", "rms_norm", "swiglu", "upsample2x")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTERPRETED_BYTES = 1e6  # larger cases take the interpreter seconds; the kernels do not know sizes apart
INTERPRETED_FLOPS = 5e7
E4M3 = 2.0**-4  # largest relative error of a number rounded to e4m3


def resources() -> Any:
    spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "bench/cuda_resources.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# The process under the interpreter.

def doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return [doubled(v) for v in value] if isinstance(value, list) else value


def allowed(row: Any, args: tuple, dtype: torch.dtype, oracle: torch.Tensor) -> torch.Tensor:
    """DESIGN 6: twice the low-precision reference's error, and a rounding band.

    Band: one unit in the last place of the result (the interpreter truncates to bf16 where a GPU rounds). Attention
    also rounds each softmax weight to the dtype of v, which moves the result by at most eps * sum_j p_j |v_j|;
    attention_fp8 to e4m3. fp64 has no wider oracle: its error is fp32's times the ratio of their eps.
    """
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        single = tuple(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else
                       [t.float() for t in a] if isinstance(a, list) else a for a in args)
        if row.name == "lincomb":
            single = (args[0], *single[1:])
        error = (row.reference(*single).double() - row.reference(*map(doubled, single))).abs().max()
        return (2 * error / torch.finfo(torch.float32).eps + oracle.abs()) * eps
    error = (row.reference(*args).double() - oracle).abs().max()
    band = oracle.abs()
    if row.name.startswith("attention"):
        q, k, v, *rest = map(doubled, args)
        weighed = row.reference(q, k, v.abs(), *rest)
        return 2 * error + eps * (band + weighed) + (E4M3 * weighed if row.name == "attention_fp8" else 0.0)
    return 2 * error + eps * band


def extra_cases(module: Any, op: str) -> Iterator[tuple[str, str, dict]]:
    """(label, name of the row's case, launch options): tiles that small cases would not choose by themselves."""
    if op.startswith("group_norm_silu"):
        split = module.Config(False, 16, 8, 3, 4)
        more = ("saturates",) if op.endswith("fp8") else ("one_group", "one_channel_groups", "volume", "no_spatial")
        for name in ("ragged", "ragged_nchw", "far_mean", "misaligned", "plain", *more):
            yield f"{name} split", name, {"config": split}
    if op.startswith("layer_norm_modulate"):
        for name in ("ragged", "both", "far_mean" if op.endswith("rows") else "shared_condition"):
            yield f"{name} pieces", name, {"config": module.Config(2, 16, 1)}
    if op in ("rms_norm", "quantize_rowwise", "geglu_rows"):
        for name in ("ragged", {"rms_norm": "plain", "quantize_rowwise": "fp8", "geglu_rows": "small"}[op]):
            yield f"{name} pieces", name, {"config": module.Config(2, 16, 1)}
    if op == "qk_norm_rope":
        for name in ("ragged", "halves"):
            yield f"{name} head by head", name, {"config": module.Config(1, 1)}
    if op in ("kv_append", "kv_gather"):
        for name in ("ragged", "misaligned", "goes_round" if op == "kv_append" else "reordered"):
            yield f"{name} pieces", name, {"config": module.Config(4, 16, 1)}
    if op == "attention":
        for name in ("block_causal", "causal_longer_queries", "bias_keys_masked_row", "packed_qkv", "sharp"):
            yield f"{name} tiles", name, {"config": module.Config(32, 16, 4, 1)}
    if op == "attention_fp8":
        for name in ("block_causal", "causal_longer_queries", "grouped_heads"):
            yield f"{name} tiles", name, {"config": module.Config(32, 32, 4, 1)}


def examine(row: Any, label: str, args: tuple, dtype: torch.dtype, options: dict) -> dict:
    from ldmfast.ops import _load

    launch = _load.kernel_module(row.name).launch
    record = {"op": row.name, "case": label, "dtype": str(dtype).removeprefix("torch."), "excess": 0.0, "error": 0.0,
              "layout": True}
    before = parity.copied(args)
    out, like = launch(*args, **options), row.fake(*args)
    if row.name in parity.MOVES:
        wrong = parity.moved(row, before, args, out)
        return {**record, "wrong": wrong, "excess": float(bool(wrong))}
    if isinstance(out, tuple):
        wrong = parity.wrong_row_codes(row, args, dtype, *out)
        return {**record, "wrong": wrong, "excess": float(bool(wrong))}
    record = {**record,
              "layout": (like.shape, like.stride(), like.dtype) == (out.shape, out.stride(), out.dtype)}
    if out.dtype == torch.float8_e4m3fn:
        wrong = parity.wrong_scaled_codes(row, args, dtype, out)
        return {**record, "wrong": wrong, "excess": float(bool(wrong))}
    if out.numel():
        oracle = row.reference(*map(doubled, args))
        error = (out.double() - oracle).abs()
        record["error"] = error.max().item()
        record["excess"] = (error - allowed(row, args, dtype, oracle)).max().item()
    return record


def interpret() -> None:
    from ldmfast.ops import ROWS, _load

    torch.set_num_threads(2)
    for op in OPS:
        row = ROWS[op]
        small = {c.name: c for c in row.cases() if "big" not in c.tags}
        for case in small.values():
            cost = row.cost(*case.args())
            if cost.bytes > INTERPRETED_BYTES or cost.flops > INTERPRETED_FLOPS:
                continue
            for dtype in DTYPES:
                if dtype != torch.float64 or case.tags & {"ragged", "empty"}:
                    print(json.dumps(examine(row, case.name, case.args(dtype), dtype, {})), flush=True)
        for label, name, options in extra_cases(_load.kernel_module(op), op):
            for dtype in DTYPES[:3]:
                print(json.dumps(examine(row, label, small[name].args(dtype), dtype, options)), flush=True)
    value_depth(ROWS["attention"])


def value_depth(row: Any) -> None:
    """v may be wider or narrower than q and k; a stride other than 1 in the last dimension is copied."""
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, 9, 2, 24, generator=generator) for _ in range(2))
    v = torch.randn(2, 40, 2, 9, generator=generator).transpose(1, 3)
    bias = torch.randn(1, 9, 9, 2, generator=generator).permute(0, 3, 1, 2)
    args = (q, k, v, bias, -0.3, True, 4)
    print(json.dumps(examine(row, "value_depth", args, torch.float32, {})), flush=True)


# The tests.

@pytest.fixture(scope="module")
def records() -> list[dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(Path(__file__))], capture_output=True, text=True, env=environment,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("op", OPS)
def test_interpreted_against_float64_reference(records: list[dict], op: str) -> None:
    mine = [r for r in records if r["op"] == op]
    assert {r["dtype"] for r in mine} == {"float32", "bfloat16", "float16", "float64"}
    assert not [r for r in mine if not r["layout"]], "layout differs from what the fake says"
    assert not [r for r in mine if not r["excess"] <= 0.0], "error above the derived tolerance (or NaN)"


def test_splits_of_the_group_do_not_depend_on_the_batch() -> None:
    """A picture's sums must be the same whatever shares its batch: the heuristic must not see the batch size."""
    import inspect

    from ldmfast.kernels import group_norm_silu

    assert "batch" not in inspect.signature(group_norm_silu.heuristic).parameters


@pytest.mark.parametrize("depth, parts", [(8, (16, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)),
                                          (96, (64, 32)), (120, (128, 0)), (160, (128, 32)), (512, (512, 0))])
def test_head_dimension_split(depth: int, parts: tuple[int, int]) -> None:
    from ldmfast.kernels import attention

    assert attention.split_depth(depth) == parts


EVERYWHERE = {"d40", "d64", "d80", "d160", "d512", "d40 cross bias"}  # attention elsewhere than sm_90: time


@pytest.mark.parametrize("arch", (80, 90, 100))
def test_compiles_without_spills(arch: int) -> None:
    """Each launcher's own choice of tile compiles to a cubin that fits the chip."""
    tool = resources()
    for op, name, arguments in tool.triton_calls():
        if op == "attention" and arch != 90 and name not in EVERYWHERE:
            continue
        found = tool.triton_resources(op, name, arguments, arch)
        assert found or (op == "attention_fp8" and arch == 80)
        for r in found:
            assert r.spills == 0, r
            assert r.shared <= tool.SHARED_LIMIT[arch], r


def test_sizes_of_one_compile() -> None:
    """Triton turns an argument that equals 1 into a constant without tensor methods: ``width.to(...)`` then fails to
    compile, which the interpreter does not show. Also fp64, which the networks' shapes above do not have.
    """
    tool = resources()

    def e(*shape: int, dtype: torch.dtype = torch.float32, last: bool = False) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device="meta")
        return x.contiguous(memory_format=torch.channels_last) if last else x

    calls = [("upsample2x", (e(1, 1, 1, 1),)), ("upsample2x", (e(2, 4, 3, 1, last=True),)), ("geglu", (e(2),)),
             ("geglu_tanh", (e(2, dtype=torch.float64),)), ("swiglu", (e(2, dtype=torch.float64),)),
             ("layer_norm_modulate", (e(1, 1, 1), e(1, 1), e(1, 1), e(1), e(1), 1e-5)),
             ("philox_normal", (e(1, 2, dtype=torch.int64), 1, 256)), ("rms_norm", (e(1, 1), e(1), 1e-5)),
             ("gate_residual", (e(1, 1, 1), e(1, 1, 1), e(1, 1))), ("quantize_rowwise", (e(1, 1), True)),
             ("quantize_rowwise", (e(1, 1, dtype=torch.float64), False)),
             ("qk_norm_rope", (e(1, 1, 3, 1, 2), e(1, 1, 3, 1, 2), *[e(2)] * 4, e(2, 1), e(2, 1), True, 1e-5)),
             ("qk_norm_rope", (e(1, 1, 3, 1, 2), None, *[None] * 4, e(1, 1, 1), e(1, 1, 1), False, None)),
             ("group_norm_silu", (e(1, 1, 1, 1), e(1, 1), 1, e(1), e(1), 1e-5, True)),
             ("group_norm_silu", (e(1, 1, 1, 40000), e(1, 1), 1, e(1), e(1), 1e-5, True)),
             ("kv_append", (e(1, 1, 1), e(1, 1, 1), e(1, 1, dtype=torch.int64), True)),
             ("kv_gather", (e(1, 1, 1, dtype=torch.float64),
                            e(1, 1, dtype=torch.int64), e(1, dtype=torch.int64), True)),
             ("lincomb", (e(1, 1, dtype=torch.float64), None, [e(dtype=torch.float64)])),
             ("attention", (e(1, 1, 1, 8), e(1, 1, 1, 8), e(1, 1, 1, 8), e(1, 1, 1, 1), 1.0, True, 1))]
    for op, arguments in calls:
        for r in tool.triton_resources(op, "one", arguments, 90):
            assert r.spills == 0, r


if __name__ == "__main__":
    interpret()
