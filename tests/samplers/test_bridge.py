"""Stochastic interpolants on exact velocities and denoisers: two Gaussian mixtures as ends, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mixture import DEVIATION, MEANS, WEIGHTS, draw
from sampler_oracles import unfold
from test_exact_score import mixture_law

from ldmfast.errors import LdmfastError
from ldmfast.samplers import Bridge, bridge, sample
from ldmfast.samplers.bridge import BRIDGES

START = np.array([[2.0, 2.0], [-2.0, 1.0]])  # the other end: two components
SHARES, WIDE = np.array([0.4, 0.6]), 0.6
# none of the named paths
BENT = Bridge(lambda t: 1 - t**2, lambda t: t**2, lambda t: 2 * t * (1 - t), lambda t: -2 * t, lambda t: 2 * t,
              lambda t: 2 - 4 * t)


def exact(path: Bridge):
    """(b, eta) from the posterior of the pair of components: given it, x0, x1 and z are jointly Gaussian with x."""
    def predict(x: torch.Tensor, t: float, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        y, a, b, g = x.numpy()[:, None, None, :], path.alpha(t), path.beta(t), path.gamma(t)
        variance = (a * WIDE) ** 2 + (b * DEVIATION) ** 2 + g**2
        away = y - a * START[:, None] - b * MEANS
        logits = np.log(SHARES)[:, None] + np.log(WEIGHTS) - (away**2).sum(-1) / (2 * variance)
        share = np.exp(logits - logits.max((1, 2), keepdims=True))
        share = (share / share.sum((1, 2), keepdims=True))[..., None]
        x0 = (share * (START[:, None] + a * WIDE**2 / variance * away)).sum((1, 2))
        x1 = (share * (MEANS + b * DEVIATION**2 / variance * away)).sum((1, 2))
        z = (share * (g / variance * away)).sum((1, 2))
        return torch.from_numpy(path.velocity(t, x0, x1, z)), torch.from_numpy(z)
    return predict


def ends(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent draws of x0 and x1."""
    g = np.random.default_rng(0)
    x0 = START[g.choice(2, count, p=SHARES)] + WIDE * draw(count, 1).numpy()
    x1 = MEANS[g.choice(3, count, p=WEIGHTS)] + DEVIATION * draw(count, 2).numpy()
    return torch.from_numpy(x0), torch.from_numpy(x1)


def start_law(y: np.ndarray) -> None:
    nearest = ((y[:, None, :] - START) ** 2).sum(-1).argmin(1)
    for k, (mean, share) in enumerate(zip(START, SHARES)):
        part, n = y[nearest == k], len(y)
        assert abs(len(part) / n - share) < 5 * math.sqrt(share * (1 - share) / n)
        assert np.abs(part.mean(0) - mean).max() < 5 * WIDE / math.sqrt(len(part))
        assert np.abs(part.var(0) / WIDE**2 - 1).max() < 5 * math.sqrt(2 / len(part))


@pytest.mark.parametrize("path", [*BRIDGES, BENT], ids=[*BRIDGES, "bent"])
@pytest.mark.parametrize("diffusion", [0.0, 1.0, lambda t: 3 * (t * (1 - t)) ** 2], ids=["ode", "gamma", "function"])
@pytest.mark.parametrize("backward", [False, True])
def test_every_diffusion_joins_the_ends(path: str | Bridge, diffusion, backward: bool) -> None:
    curve, count = BRIDGES[path] if isinstance(path, str) else path, 2000
    table = bridge(250, path=path, diffusion=diffusion, backward=backward)
    g = torch.Generator().manual_seed(3)
    noise = [torch.randn(count, 2, generator=g, dtype=torch.float64) for _ in range(table.num_stages)]
    assert table.needs_noise.any() == (diffusion != 0.0) and not table.needs_noise[-1]
    y = unfold(table, ends(count)[1 if backward else 0], exact(curve), noise)[-1].numpy()
    start_law(y) if backward else mixture_law(y, DEVIATION)


@pytest.mark.parametrize("heun, low, high", [(False, 0.85, 1.2), (True, 2.7, 3.3)])
def test_order_and_the_way_back(heun: bool, low: float, high: float) -> None:
    """Forward and back again is the identity for the ODE, up to Euler's order; Heun's local errors h^3 have opposite
    signs on the two ways, which leaves the third."""
    x, predict = ends(100)[0], exact(BRIDGES["linear"])
    steps, errors = (32, 45, 64, 90), []
    for n in steps:
        there = unfold(bridge(n, heun=heun), x, predict)[-1]
        back = unfold(bridge(n, heun=heun, backward=True), there, predict)[-1]
        errors.append(float((back - x).norm(dim=1).median()))
    assert low < -np.polyfit(np.log(steps), np.log(errors), 1)[0] < high


def test_the_loop_reads_a_pair() -> None:
    x, table = ends(50)[0], bridge(20)
    assert torch.allclose(sample(exact(BRIDGES["linear"]), x, table=table),
                          unfold(table, x, exact(BRIDGES["linear"]))[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arguments, match", [
    ({}, "either steps or times"), ({"steps": 0}, "steps=0"), ({"times": [0.0]}, "two or more"),
    ({"times": [0.5, 0.2]}, "two or more"), ({"steps": 3, "path": "curved"}, "linear, trigonometric"),
    ({"steps": 3, "diffusion": -1.0}, "diffusion=-1.0"), ({"steps": 3, "diffusion": lambda t: 1.0}, "0 where gamma is"),
    ({"steps": 3, "diffusion": 1.0, "heun": True}, "heun is for the ODE"),
    ({"steps": 4, "diffusion": lambda t: math.sin(math.pi * t), "backward": True}, "0 where gamma is"),
])
def test_refuses(arguments: dict, match: str) -> None:
    with pytest.raises(LdmfastError, match=match):
        bridge(**arguments)
