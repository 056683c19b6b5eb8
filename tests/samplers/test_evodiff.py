"""EVODiff against its formulas written down once more, step by step on numbers, and its order on an exact score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mixture import draw, epsilon, solve
from sampler_oracles import SHAPE, network, noises

import ldmfast
from ldmfast.errors import LdmfastError
from ldmfast.samplers import Schedule, make_table, sample


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum((2, 3))[:, :, None, None]


def part(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How much of b is in a, for each channel."""
    return np.clip(dot(a, b) / dot(b, b), -2, 2)


def sigmoid(v: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-v))


def by_hand(x: np.ndarray, sigmas: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The paper's loop in kappa = sigma / alpha, which is what sigmas are; the last step is DDIM's."""
    n = len(times)
    alpha, kappa = 1 / np.sqrt(1 + sigmas**2), sigmas
    sigma = kappa * alpha

    def picture(x: np.ndarray, i: int) -> np.ndarray:
        noise = network(torch.from_numpy(x), times[i]).numpy()
        return (x - sigma[i] * noise) / alpha[i]

    def euler(x: np.ndarray, m: np.ndarray, i: int) -> np.ndarray:
        """From level i to the next."""
        if kappa[i + 1] == 0:
            return m
        return sigma[i + 1] / sigma[i] * x + sigma[i + 1] * (1 / kappa[i + 1] - 1 / kappa[i]) * m

    m1 = picture(x, 0)
    x = euler(x, m1, 0)
    m0 = picture(x, 1)
    for i in range(1, n - 1):
        s, h = sigma[i + 1], 1 / kappa[i + 1] - 1 / kappa[i]
        log_ratio = np.log(kappa[i - 1] / kappa[i]) / np.log(kappa[i] / kappa[i + 1])
        t = (times[i + 1] + 1) / 1000
        weight = 0.5 * (1 - ((t + 1e-3) / (1 + 1e-3)) ** 2)
        base = np.sqrt((s / sigma[i]) / (sigma[i] / sigma[i - 1]))
        first = euler(x, m0, i)
        r1 = (1 - weight) * base + weight * part(m0, m1)
        d1 = m0 - r1 * m1
        ri = np.clip(sigmoid(0.25 * abs(r1)) * log_ratio, 0.25 * log_ratio, 1.5 * log_ratio)
        x = first + 0.5 * s * h / ri * d1
        new = picture(x, i + 1)
        d2 = new - ((1 - weight) * base + weight * part(new, m0)) * m0
        before, after = d1 / log_ratio / h, log_ratio / h * d2
        eta = 0.5 * sigmoid(abs(0.5 * part(after + before, after - before)))
        theta = -eta / log_ratio * d1 + log_ratio * (1 - eta) * d2
        found = abs(part(x - first - 0.5 * s * h / ri * theta, d1) / (h * s)) - 0.5
        if n > 20:
            slope = (m0 - m1) / h
            found = -found * sigmoid(part(m0, slope) * (2 - (s / sigma[i]) ** 2))
        x = first + 0.5 * s * h / sigmoid(found) * theta
        m0, m1 = new, m0
    return euler(x, m0, n - 1)


@pytest.mark.parametrize("count", [2, 3, 7, 24])
def test_it_is_the_published_algebra(count: int) -> None:
    x = noises(1)[0]
    table = make_table(Schedule(), "evodiff", count)
    sigmas = np.append(table.noise_levels[:-1, 1] / table.noise_levels[:-1, 0], 0.0)
    wanted = by_hand(x.numpy(), sigmas, table.network_times)
    found = sample(lambda x, t, stage: network(x, t), x, table=table)
    assert found.shape == SHAPE and np.abs(found.numpy() - wanted).max() < 1e-10


def test_its_coefficients_are_each_picture_s_own() -> None:
    x = noises(1)[0]
    table = make_table(Schedule(), "evodiff", 6)
    both, one = (sample(lambda x, t, stage: network(x, t), part, table=table) for part in (x, x[1:]))
    torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-13)


def test_it_converges_with_first_order() -> None:
    """Its differences are of second order in the step, not exact to it: the slope is that of DDIM, not of
    DPM-Solver++(2M)."""
    high, low, counts = 14.0, 0.05, (16, 23, 32, 45, 64, 91, 128)
    x = draw(100, 0) * high
    exact = solve(x.numpy(), high, low, 500)
    errors = []
    for count in counts:
        sigmas = np.exp(np.linspace(np.log(high), np.log(low), count + 1)).tolist()
        table = make_table(Schedule(), "evodiff", sigmas=sigmas)
        end = sample(epsilon(table), x * table.noise_levels[0][0], table=table) * np.sqrt(1 + low**2)
        errors.append(np.median(np.linalg.norm(end.numpy() - exact, axis=1)))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    print(f"evodiff: slope {slope:.3f}, errors {errors[0]:.1e} .. {errors[-1]:.1e}")
    assert 0.85 < slope < 1.4


def test_a_pipeline_draws_with_it() -> None:
    """With guidance, from an image's middle, and near to what many steps of another solver make."""
    pipe = ldmfast.Pipeline.tiny()
    call = {"prompt": "a red circle above a blue square", "generator": 1, "progress": False, "output_type": "latent"}
    fine = pipe(**call, solver="dpmpp_2m", num_inference_steps=40).images
    errors = [float((pipe(**call, solver="evodiff", num_inference_steps=n).images - fine).square().mean().sqrt())
              for n in (10, 40)]
    print(errors)
    assert errors[1] < errors[0] < 0.5 * float(fine.square().mean().sqrt())
    late = pipe(**call, solver="evodiff", num_inference_steps=8, strength=0.5, image=torch.zeros(1, 3, 64, 64)).images
    assert torch.isfinite(late).all()


def test_repeated_levels_and_flows_are_refused() -> None:
    with pytest.raises(LdmfastError, match="repeat a noise level"):
        make_table(Schedule(num_train_timesteps=8, timestep_spacing="linspace"), "evodiff", 12)
    with pytest.raises(LdmfastError, match="rectified flow"):
        make_table(Schedule(flow=True, prediction_type="flow_prediction"), "evodiff", 4)
