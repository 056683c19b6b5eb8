"""A diffusers pipeline with and without ldmfast: the same call, the same picture, and the speed of both.

    python examples/accelerate_pipeline.py [--precision exact|bf16|int8] [--steps 20] [--pictures 4] [--out picture.png]

The pipeline is built from the model that ships with ldmfast, with diffusers' own classes; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import ldmfast

try:
    from diffusers import StableDiffusionPipeline
except ModuleNotFoundError as error:
    raise SystemExit("this example compares with diffusers: pip install diffusers") from error

PROMPT = "a red circle above a blue square"


def draw(pipe: StableDiffusionPipeline, steps: int, pictures: int) -> tuple[np.ndarray, float]:
    """Pictures (N, H, W, 3) in [0, 1], and the seconds they took."""
    start = time.perf_counter()
    generators = [torch.Generator().manual_seed(seed) for seed in range(pictures)]
    images = pipe([PROMPT] * pictures, num_inference_steps=steps, generator=generators, output_type="np").images
    return images, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="exact", choices=("exact", "bf16", "int8"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many is shown")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    a = parser.parse_args()

    pipe = StableDiffusionPipeline.from_pretrained(Path(ldmfast.__file__).parent / "assets" / "tiny")
    pipe.set_progress_bar_config(disable=True)
    theirs, ours = [], []
    for _ in range(a.rounds):  # in turns, so that both meet the same weather on this machine
        ldmfast.restore(pipe)
        theirs.append(draw(pipe, a.steps, a.pictures))
        ldmfast.accelerate(pipe, precision=a.precision)
        ours.append(draw(pipe, a.steps, a.pictures))
    print(pipe.ldmfast_report)

    before, after = min(s for _, s in theirs), min(s for _, s in ours)
    print(f"diffusers {before:.2f} s, accelerated {after:.2f} s: {before / after:.2f} times as fast")
    print(f"largest difference of the pictures: {np.abs(theirs[0][0] - ours[0][0]).max():.1e} of 1")
    pipe.numpy_to_pil(ours[0][0])[0].save(a.out)
    print(f"saved {a.out}")


if __name__ == "__main__":
    main()
