"""What learned time grids gain: latent error against a fine solve, at as many network evaluations.

    python bench/learned_grid.py                      # writes bench/results/<device>/learned_grid.json
    python bench/learned_grid.py --count 24 --no-write --only unet
    python bench/learned_grid.py --grid grid.json     # one that `ldmfast tune-steps` wrote

The shipped UNet with dpmpp_2m and the shipped transformer with flow_euler, six evaluations each. A grid is learned from
training captions; then held-out captions, with seeds that were not learned from, are drawn with the solver's usual
steps, with the grid, and finely, in batches: by 200 steps of dpmpp_2m, or by 50 of flow_heun, which has order two where
flow_euler has one. The error of a picture is the root mean square of the difference from the last.
An evaluation of the transformer costs three of the UNet's: its grid is learned from fewer pictures. Printed: the
error's mean and median over the pictures, usual and learned, the ratios of both, and the seconds that learning took.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from ops import conditions, write
from torch import Tensor

import ldmfast
from ldmfast.pipelines.open_call import open_call
from ldmfast.samplers import TimeGrid, sample
from ldmfast.testing.scenes import sample_scenes

SOLVERS = {"unet": "dpmpp_2m", "dit": "flow_euler"}
FINE = {"unet": ("dpmpp_2m", 200), "dit": ("flow_heun", 50)}
PICTURES = {"unet": 48, "dit": 16}
STEPS, BATCH, SEEDS = 6, 25, 50_000


def ends(pipe: ldmfast.Pipeline, captions: list[str], **steps: Any) -> Tensor:
    """Latents of the captions, caption i with its own seed."""
    found = []
    for first in range(0, len(captions), BATCH):
        part = captions[first:first + BATCH]
        opened = open_call(pipe, part, generator=[SEEDS + first + i for i in range(len(part))], **steps)
        found.append(sample(opened.denoise, opened.x, table=opened.table))
    return torch.cat(found)


def arm(network: str, count: int, pictures: int | None, iterations: int, given: TimeGrid | None) -> dict[str, Any]:
    pipe, solver = ldmfast.Pipeline.tiny(network), SOLVERS[network]
    start = time.perf_counter()
    grid = given or pipe.learn_grid(steps=STEPS, solver=solver, pictures=pictures or PICTURES[network],
                                    iterations=iterations)
    seconds = time.perf_counter() - start
    captions = [scene.caption for scene in sample_scenes(count, 31, "heldout")]
    fine_solver, fine_steps = FINE[network]
    fine = ends(pipe, captions, solver=fine_solver, num_inference_steps=fine_steps)
    row: dict[str, Any] = {"solver": grid.solver, "evaluations": grid.evaluations, "seconds": seconds,
                           "grid": grid.to_dict()}
    for name, steps in (("usual", {"solver": grid.solver, "num_inference_steps": grid.evaluations}),
                        ("learned", {"grid": grid})):
        errors = (ends(pipe, captions, **steps) - fine).square().flatten(1).mean(1).sqrt()
        row[name] = {"mean": float(errors.mean()), "median": float(errors.median()), "most": float(errors.max())}
    row["ratio"] = {k: row["usual"][k] / row["learned"][k] for k in ("mean", "median")}
    print(f"{network}: {grid.evaluations} evaluations of {grid.solver}, {count} held-out pairs: mean error "
          f"{row['usual']['mean']:.4f} -> {row['learned']['mean']:.4f} ({row['ratio']['mean']:.2f}x), median "
          f"{row['usual']['median']:.4f} -> {row['learned']['median']:.4f} ({row['ratio']['median']:.2f}x); learned in "
          f"{seconds:.0f} s; target 2x: "
          + ", ".join(f"{k} {'met' if row['ratio'][k] >= 2 else 'missed'}" for k in ("median", "mean")))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="held-out pairs of a caption and a seed")
    parser.add_argument("--pictures", type=int, default=None, help="to learn from (default: 48, transformer 16)")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--only", choices=list(SOLVERS))
    parser.add_argument("--grid", type=Path, help="a grid of the UNet, instead of learning one")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    given = None if options.grid is None else TimeGrid.of(options.grid)
    networks = [options.only] if options.only else ["unet"] if given else list(SOLVERS)
    with torch.inference_mode():
        rows = {name: arm(name, options.count, options.pictures, options.iterations, given) for name in networks}
    if not options.no_write:
        print(write({**conditions("cpu"), "count": options.count, "rows": rows}, "learned_grid.json", options.out))


if __name__ == "__main__":
    main()
