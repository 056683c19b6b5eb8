"""Few-step samplers: consistency functions on a law that is known exactly, and the step lists of distilled models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from mixture import DEVIATION, MEANS, WEIGHTS, draw, epsilon, solve
from sampler_oracles import network, unfold
from test_exact_score import mixture_law
from test_sampler_parity import SCALED, compare

from ldmfast import LdmfastError
from ldmfast.samplers import Schedule, StepTable, make_table
from ldmfast.samplers.spacing import alphas_at

SCHEDULE = Schedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.02)
CLEAN = 1e-3  # the sigma that counts as none: a thousandth of what is between the components


def levels(times: list[float]) -> np.ndarray:
    """(n, 2) alpha and sigma at training times."""
    abar = alphas_at(SCHEDULE, np.array(times, dtype=np.float64))
    return np.stack([np.sqrt(abar), np.sqrt(1 - abar)], axis=1)


def trajectory(x: np.ndarray, start: np.ndarray, end: np.ndarray, steps: int) -> np.ndarray:
    """The probability-flow ODE's solution from one (alpha, sigma) to another."""
    return end[0] * solve(x / start[0], start[1] / start[0], max(end[1] / end[0], CLEAN), steps)


def exact_map(table: StepTable, jumps: list[float | None], steps: int = 80):
    """The network of a consistency model without error: its noise prediction makes the jump of each stage, to a
    training time or (None) to the clean end, the ODE's own."""
    def predict(x: torch.Tensor, t: float, i: int) -> torch.Tensor:
        start, target = table.noise_levels[i], jumps[i]
        end = np.array([1.0, 0.0]) if target is None else levels([target])[0]
        there = trajectory(x.numpy(), start, end, steps)
        return torch.from_numpy((there - end[0] / start[0] * x.numpy()) / (end[1] - end[0] / start[0] * start[1]))
    return predict


def start_of(table: StepTable, count: int) -> torch.Tensor:
    """Samples of the law at the level where the run begins."""
    alpha, sigma = table.noise_levels[0]
    pick = np.random.default_rng(0).choice(len(WEIGHTS), count, p=WEIGHTS)
    clean = torch.from_numpy(MEANS[pick]) + DEVIATION * draw(count, 1)
    return alpha * clean + sigma * draw(count, 2)


def run(table: StepTable, predict, count: int = 1200) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(count, 2, generator=generator, dtype=torch.float64) for _ in range(table.num_stages)]
    return unfold(table, start_of(table, count), predict, noise)[-1].numpy()


UNEVEN = {"timesteps": [999, 870, 300]}


@pytest.mark.parametrize("solver,options,given", [
    ("lcm", {}, {"steps": 1}), ("lcm", {}, {"steps": 4}), ("lcm", {}, UNEVEN), ("tcd", {"eta": 0.0}, UNEVEN),
    ("tcd", {"eta": 0.3}, {"steps": 4}), ("tcd", {"eta": 0.7}, UNEVEN), ("tcd", {"eta": 1.0}, {"steps": 4})], ids=str)
def test_an_exact_consistency_function_keeps_the_law(solver: str, options: dict, given: dict) -> None:
    """Re-noised or not, from 1 to 4 jumps of any lengths, the samples are the data's (Song et al. 2023, section 4)."""
    table = make_table(SCHEDULE, solver, **given, **options)
    times = [*table.timesteps.tolist(), 0.0]
    end = np.array([1.0, 0.0])
    jumps: list[float | None] = [None] * table.num_stages
    if solver == "tcd":
        jumps = [float(np.floor((1 - options["eta"]) * t + 1e-9)) for t in times[1:]]
        end = levels([0.0])[0]  # TCD's last jump goes to time 0, where a little noise is left
    y = run(table, exact_map(table, jumps))
    mixture_law(y / end[0], float(np.hypot(DEVIATION, end[1] / end[0])))


def test_the_posterior_mean_in_its_place_does_not_keep_it() -> None:
    """What the oracle above would say of a denoiser that was not distilled."""
    table = make_table(SCHEDULE, "lcm", 4)
    with pytest.raises(AssertionError):
        mixture_law(run(table, epsilon(table)), DEVIATION)


def test_phased_jumps_compose_to_the_whole_trajectory() -> None:
    """f(f(x, t -> s), s -> 0) = f(x, t -> 0), for any phases: PCM's deterministic sampling is exact."""
    whole = make_table(SCHEDULE, "tcd", timesteps=[999], eta=0.0)
    x = start_of(whole, 50)
    ends = [unfold(whole, x, exact_map(whole, [0.0], 250))[-1]]
    for times in ([999, 759, 499, 259], [999, 100]):
        table = make_table(SCHEDULE, "tcd", timesteps=times, eta=0.0)
        assert not table.needs_noise.any()
        ends.append(unfold(table, x, exact_map(table, [*times[1:], 0.0], 250))[-1])
    assert max(float((end - ends[0]).abs().max()) for end in ends[1:]) < 1e-6
    assert float((ends[0] - x).abs().max()) > 0.5


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
@pytest.mark.parametrize("count", range(2, 9))
def test_any_two_to_eight_segments_equal_diffusers(name: str, count: int) -> None:
    """MLCM's lists, where the user says where the segments end."""
    rng = np.random.default_rng(count)
    times = [999, *sorted(rng.choice(np.arange(1, 999), count - 1, replace=False).tolist(), reverse=True)]
    config = {**SCALED, "prediction_type": ("epsilon", "v_prediction")[count % 2]}
    assert compare(name, config, None, set_kwargs={"timesteps": times}, options={"timesteps": times}) <= 1e-6


TRAILING = {**SCALED, "timestep_spacing": "trailing"}
# the schedulers that these models are released with
DISTILLED = {
    "turbo": ("EulerAncestralDiscreteScheduler", TRAILING, {}),
    "sd-turbo": ("EulerDiscreteScheduler", TRAILING, {}),
    "lightning": ("EulerDiscreteScheduler", TRAILING, {}),
    "lightning-1-step": ("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, {}),
    "hyper-sd": ("DDIMScheduler", {**TRAILING, "clip_sample": False}, {}),
    "hyper-sd-unified": ("TCDScheduler", TRAILING, {}),
    "dmd2": ("LCMScheduler", TRAILING, {"timesteps": [999, 749, 499, 249]}),
    "dmd2-1-step": ("LCMScheduler", TRAILING, {"timesteps": [399]}),
    "sd3-turbo": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {}),
    "ladd": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
    "flow-renoised": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}, {}),
}


@pytest.mark.parametrize("kind", DISTILLED)
def test_lists_of_adversarially_distilled_models_equal_diffusers(kind: str) -> None:
    name, config, lists = DISTILLED[kind]
    for steps in [None] if lists else (1, 2, 4, 8):
        assert compare(name, config, steps, set_kwargs=lists, options=lists) <= 1e-6, steps


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_phased_consistency_of_a_flow(steps: int) -> None:
    """PCM's flow-matching sampler (Wang et al. 2024, released for SD 3): Euler from edge to edge of the phases, which
    are every 20th of 1000 shifted training sigmas. A call gives the edges before the shift."""
    shift, phases = 3.0, 50
    trained = [shift * k / (1000 + (shift - 1) * k) for k in range(1, 1001)]
    edges = [trained[20 * (k + 1) - 1] for k in range(phases)][::-1]
    sigmas = [edges[phases * i // steps] for i in range(steps)] + [0.0]
    x = draw(5, 0)
    want = x.clone()
    for high, low in itertools.pairwise(sigmas):
        want = want + (low - high) * network(want, 1000 * high)
    given = [1 - (phases * i // steps) / phases for i in range(steps)]
    schedule = Schedule(flow=True, prediction_type="flow_prediction", shift=shift)
    table = make_table(schedule, "flow_euler", sigmas=given)
    made = unfold(table, x, lambda x_in, t, i: network(x_in, t))[-1]
    assert float((made - want).abs().max()) < 1e-6


@pytest.mark.parametrize("solver,times", [("ddim", None), ("lcm", None), ("lcm", [399]), ("euler", None)])
def test_one_step_is_one_evaluation_and_its_picture(solver: str, times: list | None) -> None:
    """A GAN-style generator predicts the picture: x0 = G(z, t_end) is what comes back, but for LCM's boundary term
    c_skip x, below 1e-8."""
    schedule = Schedule(beta_schedule="scaled_linear", prediction_type="sample", timestep_spacing="trailing",
                        set_alpha_to_one=True)
    table = make_table(schedule, solver, None if times else 1, timesteps=times)
    assert table.num_stages == 1 and not table.needs_noise.any()
    assert table.network_times[0] == (times or [999])[0]
    x, picture = draw(5, 0), draw(5, 1)
    (made,) = unfold(table, x * table.init_noise_sigma, lambda x_in, t, i: picture)
    assert float((made - picture).abs().max()) < 1e-6


def test_consistency_boundary_at_time_zero_is_the_identity() -> None:
    """f(x, 0) = x whatever the network says (Luo et al. 2023, equation 9): c_skip(0) = 1, c_out(0) = 0."""
    table = make_table(SCHEDULE, "lcm", timesteps=[0])
    x = draw(5, 0)
    (made,) = unfold(table, x, lambda x_in, t, i: 1e3 * draw(5, 1))
    assert torch.equal(made, x)


@pytest.mark.parametrize("settings,message", [
    ({"steps": 4, "eta": 1.5}, r"eta=1.5, must be in \[0, 1\]"),
    ({"sigmas": [3.0, 1.0, 0.0]}, "takes timesteps, not sigmas"),
    ({"steps": 60}, "steps=60 is more than the 50 original_inference_steps"),
    ({"timesteps": [500, 700]}, "must fall strictly"),
    ({"steps": 4, "original_inference_steps": 0}, r"original_inference_steps=0 is not in 1\.\.1000")])
def test_what_does_not_fit_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(LdmfastError, match="^tcd: .*" + message if "steps" in settings and "timesteps" not in settings
                       else message):
        make_table(SCHEDULE, "tcd", **settings)

