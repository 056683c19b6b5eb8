"""What a solver may do about a network that is not exact, or not plain: each with the case in which it is exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mixture import DEVIATION, MEANS, WEIGHTS, draw, epsilon, stage_level
from test_exact_score import mixture_law
from torch import Tensor

from ldmfast.errors import LdmfastError
from ldmfast.samplers import Schedule, make_table, sample, soft_mixture, time_buckets

SCHEDULES = {p: Schedule(prediction_type=p) for p in ("epsilon", "v_prediction", "sample")}


def network(table, kind: str, factor=lambda t: 1.0):
    """The exact network of a parametrisation whose idea of the noise is ``factor`` of its time too large."""
    exact = epsilon(table)

    def predict(x: Tensor, t: float, stage: int) -> Tensor:
        alpha, sigma = stage_level(table, stage)
        scale = math.hypot(alpha, sigma)
        alpha, sigma, state = alpha / scale, sigma / scale, x / table.c_in[stage] / scale
        noise = exact(x, t, stage) * factor(t)
        picture = (state - sigma * noise) / alpha
        return {"epsilon": noise, "sample": picture, "v_prediction": alpha * noise - sigma * picture}[kind]

    return predict


@pytest.mark.parametrize("kind", list(SCHEDULES))
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "euler", "unipc", "deis", "ddpm", "euler_a"])
def test_epsilon_scaling_undoes_a_noise_prediction_that_is_too_large(kind: str, solver: str) -> None:
    """In every evaluation, Heun's second one too: a network whose noise is 1% too large, or by up to 5% and more so at
    late times, gives with the same lambda what the exact one gives without."""
    x = draw(50, 0)

    def run(scale, factor) -> Tensor:
        table = make_table(SCHEDULES[kind], solver, 8, epsilon_scale=scale)
        g = torch.Generator().manual_seed(1)
        return sample(network(table, kind, factor), x * table.init_noise_sigma, table=table, generator=g)

    exact = run(1.0, lambda t: 1.0)
    torch.testing.assert_close(run(1.01, lambda t: 1.01), exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(run((1.0, 0.05), lambda t: 1 + 0.05 * t / 1000), exact, rtol=0, atol=1e-4)
    assert float((run(1.0, lambda t: 1.01) - exact).abs().max()) > 1e-3
    plain, one = make_table(SCHEDULES[kind], solver, 8), make_table(SCHEDULES[kind], solver, 8, epsilon_scale=1.0)
    assert np.array_equal(plain.matrices, one.matrices)


def test_epsilon_scaling_is_refused_where_it_means_nothing() -> None:
    flow = Schedule(flow=True, prediction_type="flow_prediction")
    for schedule, solver, scale in ((flow, "flow_euler", 1.01), (Schedule(), "pndm", 1.01), (Schedule(), "ddim", 0.0),
                                    (Schedule(), "ddim", (1.0, -1.0)), (Schedule(), "ddim", math.inf)):
        with pytest.raises(LdmfastError):
            make_table(schedule, solver, 4, epsilon_scale=scale)


def test_time_buckets_change_what_the_network_is_told_and_nothing_else() -> None:
    table = make_table(Schedule(), "ddim", 20)
    shared = make_table(Schedule(), "ddim", 20, network_times=time_buckets(100, 4))
    assert np.array_equal(table.matrices, shared.matrices)
    told = dict(zip(table.network_times, shared.network_times))
    assert told[50] == 50 and told[0] == 0 and all(v == t for t, v in told.items() if t >= 100)
    near = time_buckets(100, 4)
    assert [near(t) for t in (0, 24.9, 25, 49, 99.9, 100, 731)] == [0, 0, 25, 25, 75, 100, 731]
    x = draw(20, 0)
    exact = epsilon(table)
    seen: list[float] = []
    bucketed = sample(lambda y, t, i: seen.append(t) or exact(y, t, i), x, table=shared)
    assert seen == shared.network_times.tolist()
    torch.testing.assert_close(bucketed, sample(exact, x, table=table), rtol=0, atol=0)
    for wrong in ((0, 3), (100, 0), (math.inf, 2)):
        with pytest.raises(LdmfastError):
            time_buckets(*wrong)


def test_a_run_may_start_from_an_auxiliary_model_at_an_earlier_time() -> None:
    """Draws of the data noised to T' < T, which an auxiliary model would make, run on to the data's law; unit noise at
    T' does not, because that is not the law there."""
    times = np.linspace(300, 1, 100).round().tolist()
    table = make_table(Schedule(), "dpmpp_2m", timesteps=times)
    alpha, sigma = table.noise_levels[0]
    pick = np.random.default_rng(0).choice(3, 2000, p=WEIGHTS)
    auxiliary = torch.from_numpy(MEANS[pick]) + DEVIATION * draw(2000, 1)
    start = table.add_noise(auxiliary, draw(2000, 2))
    torch.testing.assert_close(start, alpha * auxiliary + sigma * draw(2000, 2))
    mixture_law(sample(epsilon(table), start, table=table).numpy(), DEVIATION)
    with pytest.raises(AssertionError):
        mixture_law(sample(epsilon(table), draw(2000, 2), table=table).numpy(), DEVIATION)


def test_soft_mixture_denoising_draws_points_in_three_steps() -> None:
    """Data that are three points: a latent that chooses one of them with its posterior probability makes each ancestral
    step exact, however long; the mean denoiser's few steps end between the points."""
    points, count = torch.from_numpy(MEANS), 4000
    table = make_table(Schedule(), "ddpm", timesteps=[999, 600, 300])

    def shares(x: Tensor, stage: int) -> Tensor:
        alpha, sigma = table.noise_levels[stage]
        distance = (x[:, None] - alpha * points).square().sum(-1)
        return (torch.from_numpy(np.log(WEIGHTS)) - distance / (2 * sigma**2)).softmax(1)

    def noise_of(x: Tensor, picture: Tensor, stage: int) -> Tensor:
        alpha, sigma = table.noise_levels[stage]
        return (x - alpha * picture) / sigma

    def chooses(x: Tensor, t: float, stage: int, eta: Tensor) -> Tensor:
        u = torch.special.ndtr(eta)
        chosen = (u > shares(x, stage).cumsum(1)).sum(1).clamp(max=2)
        return noise_of(x, points[chosen], stage)

    def mean(x: Tensor, t: float, stage: int) -> Tensor:
        return noise_of(x, shares(x, stage) @ points, stage)

    pick = np.random.default_rng(0).choice(3, count, p=WEIGHTS)
    start = table.add_noise(points[torch.from_numpy(pick)], draw(count, 3))
    g = [torch.Generator().manual_seed(s) for s in (1, 2)]
    ends = sample(soft_mixture(chooses, 1, g[0]), start, table=table, generator=g[1])
    away, nearest = (ends[:, None] - points).norm(dim=-1).min(1)
    assert float(away.max()) < 1e-9
    for k, weight in enumerate(WEIGHTS):
        assert abs(float((nearest == k).double().mean()) - weight) < 5 * math.sqrt(weight * (1 - weight) / count)
    blurred = sample(mean, start, table=table, generator=g[1])
    assert float((blurred[:, None] - points).norm(dim=-1).min(1).values.mean()) > 0.05
    with pytest.raises(LdmfastError):
        soft_mixture(chooses, 0)


@pytest.mark.parametrize("options", [{"s_churn": 20.0}, {"s_churn": 60.0, "s_tmin": 0.05, "s_tmax": 8.0}])
def test_churned_heun_keeps_the_law_and_tells_the_raised_level(options: dict) -> None:
    """Karras' algorithm 2: noise is added before a step and removed by it. The law stays the mixture's, while the ends
    are no longer a function of the start."""
    high, low, steps = 14.0, 0.02, 60
    sigmas = np.exp(np.linspace(np.log(high), np.log(low), steps + 1)).tolist()
    table, plain = (make_table(Schedule(), "heun", sigmas=sigmas, **o) for o in (options, {}))
    raised = 1 + min(options["s_churn"] / steps, math.sqrt(2) - 1)
    inside = [options.get("s_tmin", 0) <= s <= options.get("s_tmax", math.inf) for s in sigmas[:-1]]
    wanted = [s * raised if i else s for s, i in zip(sigmas, inside)]
    np.testing.assert_allclose(table.noise_levels[:-1, 1], wanted, rtol=1e-12)
    np.testing.assert_allclose(table.c_in[::2], 1 / np.sqrt(np.square(wanted) + 1), rtol=1e-12)
    assert np.array_equal(make_table(Schedule(), "heun", sigmas=sigmas, s_churn=0.0).matrices, plain.matrices)
    pick = np.random.default_rng(0).choice(3, 2000, p=WEIGHTS)
    start = torch.from_numpy(MEANS[pick]) + DEVIATION * draw(2000, 1) + table.noise_levels[0, 1] * draw(2000, 2)
    ends = [sample(epsilon(table), start, table=table, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    mixture_law(ends[0].numpy(), math.hypot(DEVIATION, low))
    assert float((ends[0] - ends[1]).square().mean()) > 0.1
