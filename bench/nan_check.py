"""What looking for NaN costs: seconds of the check that every call makes, beside those of one denoising step.

    python bench/nan_check.py            # the shipped model on one thread: no other has steps as short

A call looks at its latents once, after the loop, and at its pixels once, after decoding; a step is one evaluation of
the network with guidance, and lincomb. Prints the medians of CPU time and their ratio, and writes them to
bench/results/<device>/nan_check.json. The exit status is 1 above 0.5%.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from ops import conditions, write

import ldmfast
from ldmfast.pipelines.denoiser import finite

LIMIT = 0.005


def seconds(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def step_seconds(pipe: ldmfast.Pipeline, repeats: int) -> float:
    """Of one step: from one step callback to the next, of a call with guidance."""
    stamps: list[float] = []

    def on_step(*_: object) -> None:
        stamps.append(time.thread_time())

    pipe("a red circle above a blue square", generator=0, num_inference_steps=repeats + 1, solver="ddim",
         output_type="latent", callback_on_step_end=on_step, progress=False)
    return statistics.median([b - a for a, b in itertools.pairwise(stamps)])


def measure(precision: str, repeats: int) -> dict[str, str | float]:
    pipe = ldmfast.Pipeline.tiny(precision=precision)
    call = {"prompt": "three yellow rings", "generator": 0, "num_inference_steps": 2, "progress": False}
    latents, pixels = (pipe(**call, output_type=kind).images for kind in ("latent", "pt"))
    step_seconds(pipe, 5)
    step = step_seconds(pipe, repeats)
    with torch.inference_mode():
        parts = [seconds(lambda x=x: finite(x), repeats) for x in (latents, pixels)]
    return {"precision": precision, "latents us": round(parts[0] * 1e6, 1), "pixels us": round(parts[1] * 1e6, 1),
            "step ms": round(step * 1e3, 3), "share of a step": round(sum(parts) / step, 5)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="*", default=["exact", "bf16", "int8"])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)  # then CPU time is the time of the call
    rows = [measure(precision, args.repeats) for precision in args.precision]
    for row in rows:
        print("{precision}: latents {latents us} us, pixels {pixels us} us, once a call; a step {step ms} ms: "
              "{share of a step:.2%} of a step".format(**row))
    if not args.no_write:
        record = {**conditions("cpu"), "clock": "thread CPU time", "limit": LIMIT, "rows": rows}
        print(f"written to {write(record, 'nan_check.json')}")
    return 0 if all(row["share of a step"] <= LIMIT for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
