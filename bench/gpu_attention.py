"""attention on a GPU: our kernels (wgmma and mma in CUDA C++, Triton) against every one of torch's, in one run.

    python bench/gpu_attention.py --out FOLDER    # attention.json; prints the fastest arm of every shape

The arms take turns, call by call; each is checked against float64 first, on the first head. A star marks what
kernels/_attention_choice.py chooses. fp8 is ops.attention_fp8, with the passes that make its codes; another row, it is
never chosen. On a CPU, as a dry run: torch's way and, under TRITON_INTERPRET=1, the Triton kernels in the interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_clock
import torch
from ops import clock, conditions, medians, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ldmfast
from ldmfast.ops import ROWS

# name: batch, queries, keys, heads, depth, causal
SHAPES = {
    "sd15 4096x40": (2, 4096, 4096, 8, 40, False), "sd15 1024x80": (2, 1024, 1024, 8, 80, False),
    "sd15 256x160": (2, 256, 256, 8, 160, False), "sd15 4096x40 batch 16": (32, 4096, 4096, 8, 40, False),
    "sd15 1024x80 batch 16": (32, 1024, 1024, 8, 80, False), "sd15 256x160 batch 16": (32, 256, 256, 8, 160, False),
    "sdxl 4096x64": (2, 4096, 4096, 10, 64, False), "sdxl 1024x64": (2, 1024, 1024, 20, 64, False),
    "flux 4608x128": (1, 4608, 4608, 24, 128, False), "dit 1024x72": (2, 1024, 1024, 16, 72, False),
    "sd15 cross 4096x77x40": (2, 4096, 77, 8, 40, False), "sdxl cross 4096x77x64": (2, 4096, 77, 10, 64, False),
    "clip 77x64 causal": (2, 77, 77, 12, 64, True), "large 16384x128": (1, 16384, 16384, 16, 128, False),
    "vae_tiny": (1, 64, 64, 1, 64, False),
}
# on normal numbers, of which softmax makes small results: 0.05 from q, k and v, and the weights
FP8_ERROR = 0.1
TORCH = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION}


def torchs(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel([backend]):
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal).transpose(1, 2)


def arms(args: tuple[Any, ...], device: str) -> dict[str, Callable[..., Tensor]]:
    def by_torch(backend: SDPBackend) -> Callable[..., Tensor]:
        return lambda q, k, v, bias, scale, causal, block: torchs(backend, q, k, v, causal)

    if device == "cpu" and "TRITON_INTERPRET" not in os.environ:
        return {"op": ROWS["attention"].overload, "math": by_torch(SDPBackend.MATH)}
    from ldmfast.kernels import _attention_choice, attention, attention_fp8

    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    able = _attention_choice.able(*args, capability, ldmfast.ops.CUDA_LIBRARY.loaded)
    found: dict[str, Callable[..., Tensor]] = {
        name: partial(attention.launch, backend=name) for name in able if name != "sdpa"}
    if device == "cpu" or capability >= (8, 9):
        found["fp8"] = lambda q, k, v, bias, *rest: attention_fp8.launch(q, k, v, *rest)
    torch_has = TORCH if device == "cuda" else {"math": SDPBackend.MATH}
    return found | {name: by_torch(backend) for name, backend in torch_has.items()}


def choice(args: tuple[Any, ...], device: str) -> str:
    if device == "cpu":
        return "op"
    from ldmfast.kernels import _attention_choice

    q, k, v, _, scale, causal, block = args
    return _attention_choice.choice_of(q, k, v, False, scale, causal, block).backend


def error(out: Tensor, args: tuple[Any, ...]) -> float:
    """|out - reference| / |reference| of the first head of the first picture, at most 512 queries."""
    q, k, v, _, scale, causal, block = args
    few = slice(0, 512) if not causal else slice(None)
    exact = ROWS["attention"].reference(q[:1, few, :1].double(), k[:1, :, :1].double(), v[:1, :, :1].double(), None,
                                        scale, causal, block)
    return float((out[:1, few, :1].double() - exact).norm() / exact.norm())


def measure(name: str, dtype: torch.dtype, device: str, repeats: int) -> list[dict[str, Any]]:
    batch, queries, keys, heads, depth, causal = SHAPES[name]
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, device=device, generator=generator)
    if queries == keys:
        q, k, v = draw(batch, queries, 3, heads, depth).to(dtype).unbind(2)
    else:
        q, k, v = (draw(batch, t, heads, depth).to(dtype) for t in (queries, keys, keys))
    args = (q, k, v, None, depth**-0.5, causal, 1)
    cost = ROWS["attention"].cost(*args)
    rows, calls, chosen = [], {}, choice(args, device)
    for arm, call in arms(args, device).items():
        row: dict[str, Any] = {"op": "attention_fp8" if arm == "fp8" else "attention", "case": name,
                               "dtype": str(dtype)[6:], "arm": arm,
                               "chosen": arm == chosen or (chosen == "sdpa" and arm in TORCH)}
        rows.append(row)
        try:
            row["error"] = error(call(*args), args)
            calls[arm] = gpu_clock.repeated(call, args, cost.bytes, partial(clock, device))
        except RuntimeError as problem:  # torch's backends refuse some shapes
            row["failed"] = (str(problem).splitlines() or [""])[0]
    found = medians(device, {arm: call for arm, (call, _, _) in calls.items()}, repeats)
    for row in rows:
        if row["arm"] in found:
            seconds = found[row["arm"]] / calls[row["arm"]][1]
            row |= {"ms": round(seconds * 1e3, 5), "tflops": round(cost.flops / seconds / 1e12, 2)}
            if device == "cuda" and row["arm"] in ("mma", "wgmma", "triton", "fp8"):
                row["backend"] = "triton" if row["arm"] in ("triton", "fp8") else "cuda"  # what the op table reads
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--case", nargs="*", choices=list(SHAPES), default=[n for n in SHAPES if n != "vae_tiny"])
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="folder (default: bench/results/<device>)")
    options = parser.parse_args()
    record: dict[str, Any] = {**conditions(options.device), "rows": []}
    wrong = 0
    for dtype in options.dtype:
        for name in options.case:
            with torch.inference_mode():
                rows = measure(name, getattr(torch, dtype), options.device, options.repeats)
            record["rows"] += rows
            write(record, "attention.json", options.out)
            timed = sorted((r for r in rows if "ms" in r), key=lambda r: r["ms"])
            texts = [f"{r['arm']}{'*' * r['chosen']} {r['ms']:.4f} ms" for r in timed]
            print(f"{name:24s} {dtype:9s} " + "  ".join(texts), flush=True)
            bad = [r for r in rows if r["arm"] not in TORCH and (
                "failed" in r or not r["error"] < (FP8_ERROR if r["arm"] == "fp8" else 1e-2))]
            wrong += len(bad)
            for r in bad:
                print(f"WRONG {name} {dtype} {r['arm']}: {r.get('failed') or r['error']}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
