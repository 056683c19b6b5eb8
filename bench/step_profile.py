"""Where one denoiser step spends its time: by kernel, and by op with its share of the roofline measured here.

    python bench/step_profile.py                   # the shipped model, on the GPU if there is one
    python bench/step_profile.py --model sdxl --dtype float16 --device cuda --out FOLDER

Every operator of a step is called under a label of its own; the profiler's time of what runs beneath it (kernels on a
GPU, the call itself on a CPU) is set against the least time that its bytes and floating-point operations allow at the
copy bandwidth and matmul rate measured in the same run. Weights are random but for the shipped model. Writes
profile-<model>.json and, to look at in a trace viewer, profile-<model>.trace.json.gz.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from gpu_models import MODELS, Model, denoiser
from ops import conditions, medians, result_path, roofline
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from ldmfast.ops import ROWS
from ldmfast.ops._op import nbytes

WEIGHT_FIRST = ("aten::addmm",)  # bias, x, weight; everything else that multiplies has x, weight


def cost(function: Any, args: tuple[Any, ...], out: Any) -> tuple[float, float]:
    """(floating-point operations, bytes that must cross memory once) of one operator call."""
    space, _, name = function._schema.name.partition("::")
    if space == "ldmfast":
        found = ROWS[name].cost(*args)
        return found.flops, found.bytes
    tensors = [x for x in tree_flatten((args, out))[0] if isinstance(x, Tensor)]
    moved = nbytes(*tensors)
    if name in ("linear", "_linear_pointwise", "mm", "addmm", "bmm", "matmul", "baddbmm"):
        x = args[1] if name in ("addmm", "baddbmm") else args[0]
        return 2.0 * out.numel() * x.shape[-1], moved
    if "conv" in name and isinstance(out, Tensor) and out.ndim == 4:
        weight = args[1]
        return 2.0 * out.numel() * weight[0].numel() if not weight.is_mkldnn else 2.0 * out.numel() * (
            weight.numel() // weight.shape[0]), moved
    return 0.0, moved


class Labels(TorchDispatchMode):
    """Calls every operator under a label, and notes what it costs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[str, float, float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        label = f"op#{len(self.calls)}"
        with record_function(label):
            out = func(*args, **(kwargs or {}))
        view = isinstance(out, Tensor) and any(
            isinstance(a, Tensor) and not a.is_mkldnn and not out.is_mkldnn and a.numel() and out.numel()
            and a.untyped_storage().data_ptr() == out.untyped_storage().data_ptr() for a in tree_flatten(args)[0])
        free = view and not func._schema.is_mutable
        self.calls[label] = (func._schema.name, *((0.0, 0.0) if free else cost(func, args, out)))
        return out


def by_op(events: Any, calls: dict[str, tuple[str, float, float]], device: str, peak: dict[str, float]
          ) -> list[dict[str, Any]]:
    """Rows op, calls, ms, roofline: the share of the measured roofline, 1 is the least time possible."""
    total: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)
    for event in events:
        if event.key not in calls or (device == "cuda" and str(event.device_type).endswith("CUDA")):
            continue
        name, flops, moved = calls[event.key]
        seconds = (event.device_time_total if device == "cuda" else event.cpu_time_total) * 1e-6
        floor = max(moved / peak["bytes_per_s"], flops / peak["flop_per_s"])
        for i, value in enumerate((1, seconds, floor, flops, moved)):
            total[name][i] += value
    rows = [{"op": name, "calls": int(n), "ms": round(s * 1e3, 4), "roofline": round(f / s, 3) if s else None,
             "gflop": round(flops / 1e9, 3), "gbytes": round(moved / 1e9, 4)}
            for name, (n, s, f, flops, moved) in total.items() if s]
    return sorted(rows, key=lambda r: -r["ms"])


def by_kernel(events: Any, device: str) -> list[dict[str, Any]]:
    """Rows kernel, calls, ms: own time of GPU kernels, on a CPU of operators."""
    own = [(e.key, e.count, (e.self_device_time_total if device == "cuda" else e.self_cpu_time_total) / 1e3)
           for e in events if not e.key.startswith("op#")]
    return [{"kernel": k, "calls": n, "ms": round(ms, 4)} for k, n, ms in sorted(own, key=lambda r: -r[2]) if ms > 0]


def measure(model: Model, dtype: torch.dtype, device: str, repeats: int, folder: Path) -> dict[str, Any]:
    step = denoiser(model, dtype, device)
    found = medians(device, {"step": step}, repeats)
    peak = roofline(device, device, dtype)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.inference_mode(), profile(activities=activities) as profiler, Labels() as labels:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"profile-{model.name}.trace.json.gz"))
    events = profiler.key_averages()
    ops = by_op(events, labels.calls, device, peak)
    return {**conditions(device), "model": model.name, "dtype": str(dtype)[6:], "step_ms": found["step"] * 1e3,
            "peaks": peak, "in_ops_ms": sum(r["ms"] for r in ops), "ops": ops, "kernels": by_kernel(events, device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--model", default="tiny", choices=sorted(MODELS))
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float16" if device == "cuda" else "float32",
                        choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="folder (default: bench/results/<device>)")
    options = parser.parse_args()
    folder = options.out or result_path(conditions(options.device)["device"], "").parent
    record = measure(MODELS[options.model], getattr(torch, options.dtype), options.device, options.repeats, folder)
    print(f"{record['model']} {record['dtype']} on {record['device']}: {record['step_ms']:.3f} ms a step")
    print(f"{'op':40s} calls       ms   share  roofline")
    for r in record["ops"][:25]:
        share = "" if r["roofline"] is None else f"{r['roofline']:8.0%}"
        print(f"{r['op']:40s} {r['calls']:5d} {r['ms']:8.3f} {r['ms'] / record['in_ops_ms']:7.1%} {share}")
    print(f"\n{'kernel':90s} calls       ms")
    for r in record["kernels"][:25]:
        print(f"{r['kernel'][:90]:90s} {r['calls']:5d} {r['ms']:8.3f}")
    (folder / f"profile-{options.model}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
