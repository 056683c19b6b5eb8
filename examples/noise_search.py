"""More noises instead of more steps: best of N, zero-order and path search with a judge that reads the picture.

    python examples/noise_search.py --out search.png
    python examples/noise_search.py --captions 16 --steps 8

Prints the share of right attributes after 1, 2, 4 and 8 noises, and what the other searches reach with as many
evaluations; the picture shows the captions in rows: one noise, best of 8, zero-order, paths.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import ldmfast
from ldmfast.search import BestOfN, PathSearch, ZeroOrder, search
from ldmfast.testing.captions import expected_of
from ldmfast.testing.judge import judge
from ldmfast.testing.scenes import sample_scenes

METHODS = {"best of 1": BestOfN(1), "best of 2": BestOfN(2), "best of 4": BestOfN(4), "best of 8": BestOfN(8),
           "zero-order": ZeroOrder(n=2, rounds=3, distance=0.7), "paths": PathSearch(n=4, keep=2, back=(0.0, 0.4))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=8, help="held-out ones")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=None, help="PNG of all")
    options = parser.parse_args()
    pipe, scenes = ldmfast.Pipeline.tiny(), sample_scenes(options.captions, 31, "heldout")
    rows: list[list[Image.Image]] = [[] for _ in scenes]
    for name, method in METHODS.items():
        scores, evaluations = [], 0
        for i, scene in enumerate(scenes):
            wanted = expected_of(scene)

            def right(pictures: Tensor, wanted=wanted) -> Tensor:
                verdicts = judge(pictures * 2 - 1, [wanted] * len(pictures))
                return torch.tensor([sum(v.values()) / len(v) for v in verdicts])

            found = search(pipe, scene.caption, right, method, seed=100 * i, num_inference_steps=options.steps,
                           solver="ddim")
            scores.append(found.score)
            evaluations += found.evaluations
            if name not in ("best of 2", "best of 4"):
                rows[i].append(found.picture)
        print(f"{name:11s} {sum(scores) / len(scores):7.2%} of the attributes right, "
              f"{evaluations / len(scenes):.0f} evaluations a picture", flush=True)
    if options.out is not None:
        sheet = Image.new("RGB", (64 * len(rows[0]), 64 * len(rows)))
        for y, row in enumerate(rows):
            for x, picture in enumerate(row):
                sheet.paste(picture, (64 * x, 64 * y))
        sheet.save(options.out)


if __name__ == "__main__":
    main()
