"""What looking for NaN costs: seconds of the check that every call makes, beside those of one denoising step.

    python bench/nan_check.py            # the shipped model on one thread: no other has steps as short

A call looks at its latents once, after the loop, and at its pixels once, after decoding; a step is one evaluation of
the network with guidance, and lincomb. Prints the medians of CPU time and their ratio. The exit status is 1 above 0.5%.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch

import ldmfast

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="exact", help="exact, bf16 or int8 (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)  # then CPU time is the time of the call
    pipe = ldmfast.Pipeline.tiny(precision=args.precision)
    call = {"prompt": "three yellow rings", "generator": 0, "num_inference_steps": 2, "progress": False}
    latents, pixels = (pipe(**call, output_type=kind).images for kind in ("latent", "pt"))
    step_seconds(pipe, 5)
    step = step_seconds(pipe, args.repeats)
    with torch.inference_mode():
        parts = [seconds(lambda x=x: bool(torch.isfinite(x).all()), args.repeats) for x in (latents, pixels)]
    share = sum(parts) / step
    print(f"{args.precision}: latents {parts[0] * 1e6:.1f} us, pixels {parts[1] * 1e6:.1f} us, once a call; "
          f"a step {step * 1e3:.2f} ms: {100 * share:.2f}% of a step")
    return 0 if share <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
