"""Our own products against oneDNN's, as the layers of a UNet and a VAE use them: packed weights, bias and residual.

Both arms are the same layer of ldmfast.models.gemm, once packed for our kernels and once for oneDNN's, called in turn.

    python bench/products.py                     # every layer, writes bench/results/<device>/products.json
    python bench/products.py --only conv --repeats 15 --no-write

Columns: ms of oneDNN and of ours in bf16, their ratio (above 1 ours is faster) and the TFLOP/s of ours; then the same
in 8 bits. A GEGLU in 8 bits ends in codes for the layer that follows, however many passes that takes. It needs a CPU
on which ours are used (AMX).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from ops import conditions, medians, write
from torch import Tensor
from tqdm import tqdm

from ldmfast import ops
from ldmfast.models import gemm

# batch, channels, outputs, pixels on a side, kernel
CONVS = [(2, 320, 320, 64, 3), (2, 640, 320, 64, 3), (2, 960, 320, 64, 3), (2, 960, 320, 64, 1), (2, 640, 640, 32, 3),
         (2, 1280, 640, 32, 3), (2, 1280, 1280, 16, 3), (2, 2560, 1280, 16, 3), (2, 1280, 1280, 8, 3),
         (2, 2560, 1280, 8, 3), (1, 512, 512, 64, 3), (1, 512, 512, 128, 3), (1, 512, 512, 256, 3),
         (1, 256, 256, 256, 3), (1, 256, 256, 512, 3), (1, 128, 128, 512, 3), (1, 128, 3, 512, 3)]
GEGLUS = [(2, 4096, 320), (2, 1024, 640), (2, 256, 1280)]  # batch, tokens, channels


def made(own: bool, int8: bool, make: Callable[[], Any]) -> Any:
    """A layer with the same weights in every arm."""
    gemm.OWN = own
    torch.manual_seed(0)
    layer = make().bfloat16().requires_grad_(False)
    layer.quantize() if int8 else layer.pack()
    return layer


def conv_call(layer: Any, x: Tensor, residual: Tensor, int8: bool) -> Callable[[], Any]:
    given = gemm.Quantized(*ops.quantize(x, pad=layer.border)) if int8 else x
    return lambda: layer(given, residual)


def geglu_call(layer: Any, x: Tensor, int8: bool) -> Callable[[], Any]:
    if not int8:
        return lambda: layer(x)
    given = gemm.Quantized(*ops.quantize(x))

    def call() -> Any:
        out = layer(given, codes=True)
        return ops.quantize(out) if isinstance(out, Tensor) else out
    return call


def compare(call: Callable[[bool, bool], Callable[[], Any]], flops: float, repeats: int) -> dict[str, float]:
    row: dict[str, float] = {}
    for kind, int8 in (("bf16", False), ("int8", True)):
        found = medians("cpu", {"onednn": call(False, int8), "own": call(True, int8)}, repeats)
        row |= {f"{kind}_onednn_ms": round(found["onednn"] * 1e3, 3), f"{kind}_ms": round(found["own"] * 1e3, 3),
                f"{kind}_ratio": round(found["onednn"] / found["own"], 2),
                f"{kind}_tflops": round(flops / found["own"] / 1e12, 2)}
    return row


def measure(case: tuple[int, ...], repeats: int) -> dict[str, Any]:
    if len(case) == 5:
        n, c, out, size, k = case
        x, residual = (torch.randn(n, d, size, size).bfloat16().contiguous(memory_format=torch.channels_last)
                       for d in (c, out))
        found = compare(lambda own, int8: conv_call(made(own, int8, lambda: gemm.Conv2d(c, out, k, padding=k // 2)), x,
                                                    residual, int8), 2.0 * n * size**2 * c * out * k**2, repeats)
        return {"layer": f"conv {k}x{k} {n}x{c}x{size}x{size} -> {out}", **found}
    n, tokens, c = case
    x = torch.randn(n, tokens, c).bfloat16()
    found = compare(lambda own, int8: geglu_call(made(own, int8, lambda: gemm.GatedLinear(c, 8 * c)), x, int8),
                    2.0 * n * tokens * c * 8 * c, repeats)
    return {"layer": f"geglu {n}x{tokens}x{c} -> {4 * c}", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["conv", "geglu"], help="only these layers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both arms")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; each arm runs once a round")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    if not gemm.OWN:
        sys.exit("this CPU (or this build) does not use products of our own: there is nothing to compare")
    torch.set_num_threads(options.threads)
    cases = [*(CONVS if options.only != "geglu" else []), *(GEGLUS if options.only != "conv" else [])]
    with torch.inference_mode():
        rows = [measure(case, options.repeats) for case in tqdm(cases, unit="layer", leave=False)]
    print(f"{'layer':36s} {'oneDNN':>8s} {'ours':>8s} ratio TFLOP/s | {'oneDNN':>8s} {'ours':>8s} ratio  TOP/s")
    for r in rows:
        print(f"{r['layer']:36s} " + " | ".join(
            f"{r[f'{k}_onednn_ms']:8.2f} {r[f'{k}_ms']:8.2f} {r[f'{k}_ratio']:5.2f} {r[f'{k}_tflops']:7.2f}"
            for k in ("bf16", "int8")))
    if not options.no_write:
        print(f"written to {write({**conditions('cpu'), 'repeats': options.repeats, 'rows': rows}, 'products.json')}")


if __name__ == "__main__":
    main()
