"""Orders and laws on an exact Gaussian-mixture score: what a solver is for, with no network in the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mixture import DEVIATION, MEANS, WEIGHTS, denoised, draw, epsilon, solve
from sampler_oracles import unfold

from ldmfast.samplers import Schedule, make_table

HIGH, LOW = 14.0, 0.05
STEPS = (16, 23, 32, 45, 64, 91, 128)


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, np.ndarray]:
    x = draw(100, 0) * HIGH
    coarse, fine = (solve(x.numpy(), HIGH, LOW, n) for n in (250, 500))
    assert np.abs(coarse - fine).max() < 1e-7  # the reference itself has converged far below what is measured
    return x, fine


# (solver, options, lowest and highest slope): theory's order, with room for the terms of the next order over a
# finite range of steps (0.15 below, more above, where a starting error of lower order may still fall faster).
# UniPC corrects with the new evaluation, which gains one order (Zhao et al. 2023, theorem 3.1).
ORDERS = [
    ("ddim", {}, 0.85, 1.2),
    ("euler", {}, 0.85, 1.2),
    ("dpmpp_2m", {}, 1.85, 2.3),
    ("dpmpp_2m", {"solver_type": "heun"}, 1.85, 2.3),
    ("dpmpp_2m", {"algorithm": "dpmsolver"}, 1.85, 2.3),
    ("heun", {}, 1.85, 2.3),
    ("dpm2", {}, 1.85, 2.3),
    ("deis", {}, 1.85, 2.3),
    ("deis", {"order": 3}, 2.3, 3.3),
    ("lms", {"order": 2}, 1.75, 2.3),
    ("lms", {}, 2.85, 4.3),
    ("unipc", {"order": 1}, 1.85, 2.3),
    ("unipc", {"order": 2}, 2.85, 3.3),
    ("unipc", {"order": 3}, 3.4, 4.6),
    ("dpmpp_3m_sde", {"eta": 0.0}, 1.75, 3.3),
]


@pytest.mark.parametrize("solver,options,low,high", ORDERS, ids=lambda v: str(v) if isinstance(v, str) else None)
def test_order_of_convergence(problem, solver: str, options: dict, low: float, high: float) -> None:
    """The slope of log error against log steps, the error being the median distance over the samples."""
    x, exact = problem
    if solver in ("dpmpp_2m", "dpmpp_3m_sde", "unipc", "deis"):
        options = {"lower_order_final": False, **options}
    errors = []
    for steps in STEPS:
        sigmas = np.exp(np.linspace(np.log(HIGH), np.log(LOW), steps + 1))
        table = make_table(Schedule(), solver, sigmas=sigmas.tolist(), **options)
        alpha = table.noise_levels[0][0]  # 1 in sigma space
        end = 1 / np.sqrt(1 + LOW**2) if alpha != 1 else 1.0
        y = unfold(table, x * alpha, epsilon(table), [torch.zeros_like(x)] * table.num_stages)[-1] / end
        errors.append(np.median(np.linalg.norm(y.numpy() - exact, axis=1)))
    slope = -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]
    print(f"{solver} {options}: slope {slope:.3f}, errors {errors[0]:.1e} .. {errors[-1]:.1e}")
    assert low < slope < high


def test_diffusers_third_order_sde_is_first_order(problem) -> None:
    """Why third_order="diffusers" is not the default: with the sign of the 1/2 in the coefficient of D2 turned
    round, as in diffusers 0.42, the noise-free limit converges with order 1, ten times slower than order 2."""
    x, exact = problem
    errors = {}
    for form in ("taylor", "diffusers"):
        sigmas = np.exp(np.linspace(np.log(HIGH), np.log(LOW), 65))
        table = make_table(Schedule(), "dpmpp_3m_sde", sigmas=sigmas.tolist(), eta=0.0, third_order=form)
        y = unfold(table, x * table.noise_levels[0][0], epsilon(table))[-1] * np.sqrt(1 + LOW**2)
        errors[form] = np.median(np.linalg.norm(y.numpy() - exact, axis=1))
    assert errors["diffusers"] > 10 * errors["taylor"]


def mixture_law(y: np.ndarray, deviation: float) -> None:
    """Component shares within a binomial bound, each component's mean and variance within a normal one: five
    deviations, so that a right sampler fails once in a million."""
    n = len(y)
    nearest = ((y[:, None, :] - MEANS) ** 2).sum(-1).argmin(1)
    for k, (mean, weight) in enumerate(zip(MEANS, WEIGHTS)):
        part = y[nearest == k]
        assert abs(len(part) / n - weight) < 5 * np.sqrt(weight * (1 - weight) / n)
        assert np.abs(part.mean(0) - mean).max() < 5 * deviation / np.sqrt(len(part))
        spread = 5 * np.sqrt(2 / len(part))
        assert np.abs(part.var(0) / deviation**2 - 1).max() < spread


@pytest.mark.parametrize("solver,steps,options", [
    ("ddpm", 1000, {}), ("ddim", 500, {"eta": 1.0}), ("euler_a", 400, {}), ("dpm2_a", 200, {}),
    ("dpmpp_2m_sde", 200, {}), ("dpmpp_3m_sde", 200, {}), ("euler", 200, {"s_churn": 20.0}),
], ids=lambda v: str(v) if isinstance(v, str) else None)
def test_stochastic_samplers_have_the_right_law(solver: str, steps: int, options: dict) -> None:
    count = 2000
    schedule = Schedule()
    if solver in ("ddpm", "ddim"):
        table = make_table(schedule, solver, steps, **options)
        sigma = 0.0
    else:
        # log-even sigmas; the mixture is still at sigma 0.02, where the run ends
        sigma = 0.02
        sigmas = np.exp(np.linspace(np.log(HIGH), np.log(sigma), steps + 1))
        table = make_table(schedule, solver, sigmas=sigmas.tolist(), **options)
    alpha, s = table.noise_levels[0]
    start = draw(count, 1).numpy() * DEVIATION
    pick = np.random.default_rng(0).choice(3, count, p=WEIGHTS)
    x = torch.from_numpy(alpha * (start + MEANS[pick]) + s * draw(count, 2).numpy())
    g = torch.Generator().manual_seed(3)
    noise = [torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(table.num_stages)]
    y = unfold(table, x, epsilon(table), noise)[-1]
    end = 1 / np.sqrt(1 + sigma**2) if alpha != 1 else 1.0
    mixture_law(y.numpy() / end, np.hypot(DEVIATION, sigma))


def test_the_oracle_denoises_as_importance_sampling_says() -> None:
    """The closed form of E[x0 | x] against a self-normalised average over draws of x0."""
    rng = np.random.default_rng(0)
    x0 = MEANS[rng.choice(3, 200000, p=WEIGHTS)] + DEVIATION * rng.standard_normal((200000, 2))
    x, sigma = np.array([0.3, 0.2]), 1.3
    weight = np.exp(-((x - x0) ** 2).sum(1) / (2 * sigma**2))
    estimate = (weight[:, None] * x0).sum(0) / weight.sum()
    error = np.sqrt(((weight[:, None] * (x0 - estimate)) ** 2).sum(0)) / weight.sum()
    assert (np.abs(denoised(x[None], sigma)[0] - estimate) < 5 * error).all()
