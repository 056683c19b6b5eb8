"""How far a picture depends on its neighbours: picture k of a batch of 8 against the same picture drawn alone.

    python tools/batch_invariance.py                     # both shipped networks, exact, bf16 and int8

Seeds are the pictures' own, so both calls draw the same noise. Prints the greatest difference of any pixel in steps of
1/255 of the pictures before they are rounded, and how many of the 8 are equal bit for bit. The exit status is 1 where a
picture in precision "exact" differs by more than 1/255.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ldmfast

PROMPTS = ("a red circle above a blue square", "three yellow rings", "a purple triangle on a gray background",
           "two green crosses", "a small white square", "a large orange circle left of a small blue ring",
           "four red triangles", "a cyan star")
NETWORKS, PRECISIONS = ("unet", "dit"), ("exact", "bf16", "int8")


@dataclass(frozen=True)
class Found:
    """worst: of any pixel, in steps of 1/255. equal: pictures that are the same bit for bit."""

    worst: float
    equal: int


def compare(network: str, precision: str, steps: int | None = None) -> Found:
    """Draws the 8 pictures in one call and one by one. steps: None, the network's own number."""
    pipe = ldmfast.Pipeline.tiny(network=network, precision=precision)
    call = {"output_type": "np", "progress": False, "num_inference_steps": steps}
    seeds = list(range(100, 100 + len(PROMPTS)))
    together = pipe(list(PROMPTS), generator=seeds, **call).images
    alone = [pipe(p, generator=s, **call).images[0] for p, s in zip(PROMPTS, seeds)]
    worst = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in zip(together, alone))
    return Found(255 * worst, sum(np.array_equal(a, b) for a, b in zip(together, alone)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="denoising steps (default: the network's own)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    failed = False
    for network in NETWORKS:
        for precision in PRECISIONS:
            found = compare(network, precision, args.steps)
            failed |= precision == "exact" and found.worst > 1
            print(f"{network}, {precision}: of 8 pictures of a batch {found.equal} equal the same picture alone bit "
                  f"for bit; greatest difference {found.worst:.3g}/255", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
