"""A stochastic interpolant between two laws, forward and back, as an ODE and as an SDE (Albergo et al. 2023): two rings
of points whose velocity and denoiser are known exactly, so that no network is needed.

    python examples/interpolants.py
    python examples/interpolants.py --path encoding-decoding --diffusion 1.0
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from ldmfast.samplers import bridge, sample
from ldmfast.samplers.bridge import BRIDGES


def ring(points: int, radius: float) -> Tensor:
    angle = torch.arange(points, dtype=torch.float64) * (2 * math.pi / points)
    return radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="linear", choices=list(BRIDGES))
    parser.add_argument("--diffusion", type=float, default=0.0, help="0: the ODE")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    path, first, last, width = BRIDGES[options.path], ring(3, 2.0), ring(5, 4.0), 0.2

    def predict(x: Tensor, t: float, stage: int) -> tuple[Tensor, Tensor]:
        """b and eta: means over the pairs of points that x may lie between."""
        a, b, g = path.alpha(t), path.beta(t), path.gamma(t)
        away = x[:, None] - (a * first[:, None] + b * last).flatten(0, 1)
        variance = (a * a + b * b) * width**2 + g * g
        share = (-(away**2).sum(-1) / (2 * variance)).softmax(1)[..., None]
        x0 = (share * (first.repeat_interleave(len(last), 0) + a * width**2 / variance * away)).sum(1)
        x1 = (share * (last.repeat(len(first), 1) + b * width**2 / variance * away)).sum(1)
        z = (share * (g / variance * away)).sum(1)
        return path.velocity(t, x0, x1, z), z

    g = torch.Generator().manual_seed(0)
    start = first[torch.randint(len(first), (1000,), generator=g)] + width * torch.randn(
        1000, 2, generator=g, dtype=torch.float64)
    there = sample(predict, start, table=bridge(options.steps, path=options.path, diffusion=options.diffusion),
                   generator=g)
    back = sample(predict, there, table=bridge(options.steps, path=options.path, backward=True))
    for name, x, points in (("forward", there, last), ("and back", back, first)):
        off = torch.cdist(x, points).min(1).values.square().mean().div(2).sqrt()
        print(f"{name}: {off:.3f} from the nearest of {len(points)} points, {width} is right")


if __name__ == "__main__":
    main()
