"""Every op on the GPU against its float64 reference, by the bound of tests/parity.py; the products in fp8 and
int8; then the engine against eager.

    python bench/gpu_check.py --out FOLDER                 # gpu-check.json, and exit status 1 if anything is wrong
    python bench/gpu_check.py --device cpu --parts engine  # the CPU stand-in of the engine

The arguments are drawn and judged on the CPU, the op runs on the device. Ops that only a CPU uses are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ops import conditions, result_path, to_device
from torch import Tensor

import ldmfast
from ldmfast.caches import DeepCache, TaylorSeer, TGate
from ldmfast.engine import CudaGraphs, Engine, Graphs, RecordedGraphs
from ldmfast.guidance import CFG
from ldmfast.models.rowwise import FORMS, RowwiseWeight
from ldmfast.ops import ROWS, quantize_rowwise

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import parity


def back(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(v.cpu() for v in value)
    return value.cpu() if isinstance(value, Tensor) else value


def check_ops(device: str, dtypes: tuple[torch.dtype, ...], only: list[str] | None, tell: Callable[[str], None]
              ) -> list[dict[str, Any]]:
    rows = []
    for name, row in sorted(ROWS.items()):
        if row.cpu_only or (only and name not in only):
            continue
        for dtype in dtypes:
            for case in parity.small_cases(row):
                def run(*args: Any, row: Any = row) -> Any:
                    there = to_device(args, device)
                    out = back(row.overload(*there))
                    if row.writes:
                        args[0].copy_(there[0])
                    return out
                try:
                    wrong = parity.failure(row, case, dtype, run=run)
                except Exception as error:  # one kernel that does not start must not hide the others
                    wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                rows.append({"op": name, "case": case.name, "dtype": str(dtype)[6:], "backend": row.live(device),
                             "wrong": wrong})
                if wrong:
                    tell(f"WRONG {name} {case.name} {dtype}: {wrong}")
    return rows


def check_attention(dtypes: tuple[torch.dtype, ...], tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every backend that can run a call of attention, not only the one that the table chooses."""
    from ldmfast.kernels import _attention_choice, attention

    row, rows, capability = ROWS["attention"], [], torch.cuda.get_device_capability()
    built = ldmfast.ops.CUDA_LIBRARY.loaded
    for dtype in dtypes:
        for case in parity.small_cases(row):
            args = to_device(case.args(dtype), "cuda")
            for backend in _attention_choice.able(*args, capability, built) if args[1].numel() else []:
                def run(*args: Any, backend: str = backend) -> Any:
                    return back(attention.launch(*to_device(args, "cuda"), backend=backend))
                try:
                    wrong = parity.failure(row, case, dtype, run=run)
                except Exception as error:
                    wrong = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                rows.append({"op": "attention", "case": case.name, "dtype": str(dtype)[6:], "backend": backend,
                             "wrong": wrong})
                if wrong:
                    tell(f"WRONG attention by {backend} {case.name} {dtype}: {wrong}")
    return rows


def check_linears(device: str) -> list[dict[str, Any]]:
    """Products in fp8 and int8 at the shapes of SDXL and FLUX (an eighth of their tokens on a CPU), against float64
    products of the same codes: relative RMS, which rounding the result to bf16 makes about 0.0017."""
    rows = []
    noise = torch.Generator().manual_seed(5)
    for form in FORMS:
        for tokens, inputs, outputs in ((4096, 640, 1920), (1024, 1280, 10240), (2, 1280, 640), (512, 3072, 3072)):
            weight, bias = torch.randn(outputs, inputs, generator=noise), torch.randn(outputs, generator=noise)
            tokens = tokens if device == "cuda" else max(2, tokens // 8)
            x = torch.randn(tokens, inputs, generator=noise).bfloat16()
            try:
                layer = RowwiseWeight(weight.to(device), bias.bfloat16().to(device), form)
                codes, scale = quantize_rowwise(x, fp8=form == "fp8")
                exact = (codes.double() * scale.double()[:, None]) @ layer.cpu().dense(torch.float64).T
                exact += bias.bfloat16().double()
                found = layer.to(device)(x.to(device)).double().cpu()
                error = float((found - exact).norm() / exact.norm())
                wrong = "" if error < 0.0025 else f"relative RMS {error:.4f}"
            except RuntimeError as reason:
                error, wrong = None, (str(reason).splitlines() or [""])[0]
            rows.append({"form": form, "shape": [tokens, inputs, outputs], "error": error, "wrong": wrong})
    return rows


def check_engine(device: str) -> dict[str, Any]:
    """The shipped model through graphs and eagerly: the largest difference of pixels, over solvers, sizes, caches and
    guidance in an interval. On a GPU the kernels are the same, so it should be 0."""
    pipe = ldmfast.Pipeline.tiny(device=device, precision="bf16" if device == "cuda" else "exact")
    graphs: Graphs = CudaGraphs(pipe.device) if device == "cuda" else RecordedGraphs()
    engine, worst = Engine(graphs), 0.0
    for change in ({}, {"solver": "euler_a", "height": 96}, {}, {"cache": DeepCache(interval=2)},
                   {"cache": TaylorSeer(interval=2, order=2)}, {"cache": TGate(gate=2)}, {"guidance": CFG(stop=0.5)}):
        call = {"solver": "dpmpp_2m", "height": 64, "width": 64, "num_inference_steps": 5, "generator": 3,
                "output_type": "pt", "progress": False, **change}
        pictures = []
        for used in (None, engine):
            pipe.engine = used
            pictures.append(pipe("a red circle above a blue square", **call).images.float().cpu())
        worst = max(worst, float((pictures[0] - pictures[1]).abs().max()))
    return {"largest_difference": worst, "graphs": len(engine)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--op", nargs="*", help="only these ops")
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--parts", nargs="*", default=["ops", "linears", "engine"],
                        choices=["ops", "linears", "engine"])
    parser.add_argument("--out", type=Path, default=None, help="folder (default: bench/results/<device>)")
    options = parser.parse_args()
    record: dict[str, Any] = {**conditions(options.device), "ops": []}
    path = (options.out or result_path(record["device"], "").parent) / "gpu-check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if "ops" in options.parts:
        dtypes = tuple(getattr(torch, d) for d in options.dtype)
        def tell(text: str) -> None:
            print(text, flush=True)
        record["ops"] = check_ops(options.device, dtypes, options.op, tell)
        if options.device == "cuda" and "attention" in (options.op or ["attention"]):
            record["ops"] += check_attention(dtypes, tell)
        path.write_text(json.dumps(record, indent=1) + "\n")  # before the engine, which may take the process down
    if "linears" in options.parts:
        record["linears"] = check_linears(options.device)
        path.write_text(json.dumps(record, indent=1) + "\n")
    engine = check_engine(options.device) if "engine" in options.parts else None
    path.write_text(json.dumps({**record, "engine": engine}, indent=1) + "\n")
    wrong = [r for r in (*record["ops"], *record.get("linears", ())) if r["wrong"]]
    for r in record.get("linears", ()):
        print(f"linear {r['form']} {r['shape']}: {r['wrong'] or r['error']}")
    print(f"{len(record['ops'])} calls of ops checked, {len(wrong)} wrong; engine: {engine or 'not asked for'}")
    return int(bool(wrong) or (engine is not None and (engine["largest_difference"] > 0 or engine["graphs"] == 0)))


if __name__ == "__main__":
    sys.exit(main())
