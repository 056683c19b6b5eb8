"""SiT on the exact velocity of a Gaussian mixture: orders, and ODE = SDE in law for every diffusion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mixture import DEVIATION, MEANS, WEIGHTS, denoised, draw
from sampler_oracles import unfold
from test_exact_score import mixture_law

from ldmfast.errors import LdmfastError
from ldmfast.models import DiT, DiTConfig
from ldmfast.samplers import Interpolant, sample, sit
from ldmfast.samplers.sit import PATHS

# a third path, which is neither linear nor of constant variance
BENT = Interpolant(lambda t: t**2, lambda t: (1 - t) * (1 + t), lambda t: 2 * t, lambda t: -2 * t)


def velocity(path: Interpolant):
    """alpha' E[data | x] + sigma' E[noise | x], from the mixture's own denoiser."""
    def predict(x: torch.Tensor, t: float, stage: int) -> torch.Tensor:
        alpha, sigma, y = path.alpha(t), path.sigma(t), x.numpy()
        if alpha == 0:  # pure noise tells nothing of the data
            data, noise = np.broadcast_to(WEIGHTS @ MEANS, y.shape), y / sigma
        else:
            data = denoised(y / alpha, sigma / alpha)
            noise = (y - alpha * data) / sigma
        return torch.from_numpy(path.alpha_slope(t) * data + path.sigma_slope(t) * noise)
    return predict


@pytest.mark.parametrize("heun, low, high", [(False, 0.85, 1.2), (True, 1.8, 2.4)])
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_order_of_the_ode(path: str, heun: bool, low: float, high: float) -> None:
    """The slope of log error against log steps up to t = 0.9, where the last evaluation is; the end is the same."""
    x, stop = draw(100, 0), 0.9

    def run(steps: int, second: bool) -> np.ndarray:
        times = [stop * i / steps for i in range(steps + 1)]
        return unfold(sit(path=path, heun=second, times=times), x, velocity(PATHS[path]))[-1].numpy()

    exact = run(1000, True)
    assert np.abs(exact - run(500, True)).max() < 1e-4  # converged far below what is measured
    steps = (16, 23, 32, 45, 64)
    errors = [np.median(np.linalg.norm(run(n, heun) - exact, axis=1)) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert low < slope < high


@pytest.mark.parametrize("path", ["linear", "trigonometric", BENT], ids=["linear", "trigonometric", "bent"])
@pytest.mark.parametrize("diffusion, scale", [(None, 1.0), ("sigma", 1.0), ("sigma", 4.0), ("constant", 0.5),
                                              ("increasing-decreasing", 3.0), (lambda t: math.exp(-4 * t), 2.0)])
def test_every_diffusion_ends_in_the_law_of_the_data(path, diffusion, scale: float) -> None:
    # BENT's velocity says nothing of the data at t = 0, as alpha' is 0 there
    times, count = np.linspace(0.02 if path is BENT else 0, 1, 200, endpoint=False), 3000
    curve = path if path is BENT else PATHS[path]
    table = sit(path=path, diffusion=diffusion, scale=scale, times=times.tolist())
    pick = np.random.default_rng(0).choice(3, count, p=WEIGHTS)
    data = MEANS[pick] + DEVIATION * draw(count, 1).numpy()
    start = torch.from_numpy(curve.alpha(times[0]) * data + curve.sigma(times[0]) * draw(count, 2).numpy())
    g = torch.Generator().manual_seed(3)
    noise = [torch.randn(start.shape, generator=g, dtype=torch.float64) for _ in range(table.num_stages)]
    assert table.needs_noise[1:-1].all() == (diffusion is not None) and not table.needs_noise[-1]
    mixture_law(unfold(table, start, velocity(curve), noise)[-1].numpy(), DEVIATION)


def test_a_network_is_told_the_time_of_the_path() -> None:
    """A SiT's call: velocity without the learned variance, t in [0, 1], the same with all embeddings made before."""
    torch.manual_seed(0)
    model = DiT.from_config(DiTConfig(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8,
                                      out_channels=8, num_embeds_ada_norm=4, freq_shift=0))
    labels, x, table = torch.tensor([1, 4]), torch.randn(2, 4, 8, 8), sit(5, diffusion="sigma")
    assert table.network_times.tolist() == [0.0, 0.2, 0.4, 0.6, 0.8]
    state = model.prepare(table.network_times.tolist(), class_labels=labels)

    def run(denoise) -> torch.Tensor:
        return sample(denoise, x, table=table, generator=torch.Generator().manual_seed(1))

    once = run(lambda y, t, stage: model(y, t, state=state)[:, :4])
    assert torch.equal(once, run(lambda y, t, stage: model(y, t, class_labels=labels)[:, :4]))
    assert torch.isfinite(once).all() and not torch.equal(once, x)


@pytest.mark.parametrize("arguments, match", [
    ({}, "either steps or times"), ({"steps": 3, "times": [0.0]}, "either steps or times"),
    ({"steps": 0}, "steps=0"), ({"times": [0.0, 1.0]}, "must rise"), ({"times": [0.5, 0.2]}, "must rise"),
    ({"steps": 3, "path": "curved"}, "linear, trigonometric"), ({"steps": 3, "diffusion": "much"}, "constant, sigma"),
    ({"steps": 3, "diffusion": "sigma", "heun": True}, "heun is for the ODE"),
    ({"steps": 3, "diffusion": "sigma", "scale": -1.0}, "scale=-1.0"),
    ({"steps": 3, "path": BENT}, "both must be positive"),
])
def test_refuses(arguments: dict, match: str) -> None:
    with pytest.raises(LdmfastError, match=match):
        sit(**arguments)
