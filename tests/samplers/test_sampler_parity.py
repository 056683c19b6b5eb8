"""Every solver against the diffusers scheduler of the same name, after every step, in float64."""

from __future__ import annotations

import itertools
import math
import warnings

import diffusers
import numpy as np
import pytest
import torch
from sampler_oracles import drive, network, noises, relative_error, unfold

from ldmfast.samplers import Schedule, make_table
from ldmfast.samplers.spacing import beta_quantile

warnings.filterwarnings("ignore", module="diffusers")

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
THREE = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]
RESPACED = ["", "karras", "exponential", "beta"]

GRIDS: dict[str, dict[str, list]] = {
    "DDPMScheduler": {"prediction_type": THREE, "timestep_spacing": SPACINGS, "clip_sample": [True, False],
                      "variance_type": ["fixed_small", "fixed_large"]},
    "DDIMScheduler": {"prediction_type": THREE, "timestep_spacing": SPACINGS, "clip_sample": [True, False],
                      "set_alpha_to_one": [True, False], "thresholding": [True, False]},
    "EulerDiscreteScheduler": {"prediction_type": THREE, "timestep_spacing": SPACINGS, "respace": RESPACED,
                               "final_sigmas_type": ["zero", "sigma_min"],
                               "interpolation_type": ["linear", "log_linear"]},
    "EulerAncestralDiscreteScheduler": {"prediction_type": THREE[:2], "timestep_spacing": SPACINGS},
    "HeunDiscreteScheduler": {"prediction_type": THREE, "timestep_spacing": SPACINGS, "respace": RESPACED,
                              "clip_sample": [True, False]},
    "LMSDiscreteScheduler": {"prediction_type": THREE, "timestep_spacing": SPACINGS, "respace": RESPACED},
    "KDPM2DiscreteScheduler": {"prediction_type": THREE[:2], "timestep_spacing": SPACINGS, "respace": RESPACED},
    "KDPM2AncestralDiscreteScheduler": {"prediction_type": THREE[:2], "timestep_spacing": SPACINGS,
                                        "respace": RESPACED},
    "PNDMScheduler": {"prediction_type": THREE[:2], "timestep_spacing": SPACINGS, "skip_prk_steps": [True, False],
                      "set_alpha_to_one": [True, False]},
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"],
        "prediction_type": THREE, "timestep_spacing": SPACINGS,
        "respace": [*RESPACED, "lu", "flow"], "solver_order": [1, 2, 3], "solver_type": ["midpoint", "heun"],
        "final_sigmas_type": ["zero", "sigma_min"], "lower_order_final": [True, False],
        "euler_at_final": [False, True], "thresholding": [False, True]},
    "UniPCMultistepScheduler": {
        "prediction_type": THREE, "timestep_spacing": SPACINGS, "respace": [*RESPACED, "flow", "flow karras"],
        "solver_order": [1, 2, 3], "solver_type": ["bh1", "bh2"], "predict_x0": [True, False],
        "final_sigmas_type": ["zero", "sigma_min"], "lower_order_final": [True, False],
        "disable_corrector": [[], [0, 2]], "thresholding": [False, True]},
    "DEISMultistepScheduler": {"prediction_type": THREE, "timestep_spacing": SPACINGS, "thresholding": [False, True],
                               "respace": [*RESPACED, "flow"], "solver_order": [1, 2, 3],
                               "lower_order_final": [True, False]},
    "LCMScheduler": {"prediction_type": THREE, "clip_sample": [True, False], "timestep_scaling": [10.0, 3.0]},
    "TCDScheduler": {"prediction_type": THREE, "original_inference_steps": [50, 40]},
    "FlowMatchEulerDiscreteScheduler": {
        "shift": [1.0, 3.0], "respace": RESPACED, "shift_terminal": [None, 0.1], "invert_sigmas": [False, True],
        "stochastic_sampling": [False, True]},
    "FlowMatchHeunDiscreteScheduler": {"shift": [1.0, 3.0]},
}


def variants(name: str, at_most: int) -> list[dict]:
    """The grid's combinations, or an even pick of them that a prime stride keeps mixing the settings."""
    grid = GRIDS[name]
    configs = []
    for values in itertools.product(*grid.values()):
        config = dict(zip(grid, values))
        respace = config.pop("respace", "")
        config |= {f"use_{word}_{'lambdas' if word == 'lu' else 'sigmas'}": True for word in respace.split()}
        if not name.startswith("FlowMatch"):
            config |= SCALED
        if config.get("use_flow_sigmas"):
            config |= {"prediction_type": "flow_prediction", "flow_shift": 3.0}
        configs.append(config)
    stride = 7919
    return [configs[i * stride % len(configs)] for i in range(min(len(configs), at_most))]


def refused(config: dict) -> bool:
    """Combinations for which diffusers has no finite answer, or none at all."""
    zero = config.get("final_sigmas_type", "zero") == "zero"
    algorithm = config.get("algorithm_type", "")
    return ((algorithm in ("dpmsolver", "sde-dpmsolver") and zero)
            or (algorithm == "sde-dpmsolver" and config.get("solver_order") == 3)
            or (config.get("predict_x0") is False and (zero or "use_flow_sigmas" in config
                                                        or config["thresholding"]))
            or (algorithm in ("dpmsolver", "sde-dpmsolver") and "use_flow_sigmas" in config)
            # DPM-Solver's flow list ends at the VP schedule's sigma, which its own last sigma may undercut
            or ("algorithm_type" in config and "use_flow_sigmas" in config and not zero)
            # without the falling order UniPC's last step, to sigma 0 or of length 0, divides by zero
            or ("disable_corrector" in config and not config["lower_order_final"])
            # B(h) = h times an empty sum at an infinite h
            or (config.get("solver_type") == "bh1" and zero))


def compare(name: str, config: dict, steps: int | None, *, options: dict | None = None, seed: int = 0,
            wide: bool = True, begin: int = 0, start: int = 0, **drive_kwargs) -> float:
    x, noise = 3 * noises(1, seed)[0], noises(120, seed + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, scheduler = drive(getattr(diffusers, name), config, steps, x if wide else x.float(), wide=wide,
                                  noise=noise if wide else [n.float() for n in noise], begin=begin, **drive_kwargs)
    schedule = Schedule.from_config({"_class_name": name, **config})
    table = make_table(schedule, None, steps, start=start, **(options or {}))
    ours = unfold(table, x, lambda a, t, i: network(a, t), noise)
    if wide:
        times = [float(t) for t in scheduler.timesteps[begin:]]
        assert np.abs(table.network_times - times).max() < 1e-6
        if not start:
            assert table.init_noise_sigma == pytest.approx(float(getattr(scheduler, "init_noise_sigma", 1.0)), 1e-9)
    assert all(torch.isfinite(s).all() for s in theirs), "diffusers has no finite answer"
    return relative_error(ours, theirs)


@pytest.mark.parametrize("name", GRIDS)
def test_every_step_equals_diffusers(name: str, record_property) -> None:
    """prediction x spacing x respacing x order x ... x steps, at most 1e-6 of the state's size after each step."""
    worst, count = 0.0, 0
    limit = {"DPMSolverMultistepScheduler": 200, "UniPCMultistepScheduler": 200,
             # their constructors build 1000-step lists, the slowest part of this file
             "HeunDiscreteScheduler": 20, "LMSDiscreteScheduler": 20, "KDPM2DiscreteScheduler": 16,
             "KDPM2AncestralDiscreteScheduler": 16}.get(name, 60)
    for i, config in enumerate(variants(name, limit)):
        if refused(config):
            continue
        choices = (1, 2, 3, 5, 20) if not (name == "PNDMScheduler" and not config["skip_prk_steps"]) else (4, 5, 20)
        for steps in {choices[i % len(choices)], choices[(i + 2) % len(choices)]} | ({50} if i == 0 else set()):
            if config.get("shift_terminal") and steps == 1:
                continue  # the stretch of a single sigma of 1 is 0 / 0
            error = compare(name, config, steps, seed=i)
            assert error <= 1e-6, f"{config}, {steps} steps: {error:.1e}"
            worst, count = max(worst, error), count + 1
    assert count >= 4
    print(f"{name}: {count} runs, largest error {worst:.1e}")


EXTRA = [
    # (class, config, steps, keywords of set_timesteps, our options)
    ("DDPMScheduler", {}, None, {"timesteps": [900, 700, 350, 20, 3]}, {}),
    ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}, 12, {}, {}),
    ("DDPMScheduler", {"beta_schedule": "sigmoid"}, 12, {}, {}),
    ("DDPMScheduler", {"beta_schedule": "laplace", "clip_sample": False}, 12, {}, {}),
    ("DDIMScheduler", {"trained_betas": list(np.linspace(0.001, 0.02, 300)), "num_train_timesteps": 300}, 7, {}, {}),
    ("DDIMScheduler", {**SCALED, "steps_offset": 1, "clip_sample": False}, 20, {}, {}),
    ("DDIMScheduler", {**SCALED, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                       "timestep_spacing": "trailing", "clip_sample": False}, 10, {}, {}),
    ("EulerDiscreteScheduler", {**SCALED, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
                                "timestep_spacing": "trailing"}, 10, {}, {}),
    ("EulerDiscreteScheduler", SCALED, None, {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}, {}),
    ("EulerDiscreteScheduler", SCALED, None, {"sigmas": [14.615, 6.475, 3.861, 2.697, 0.963, 0.152, 0.0]}, {}),
    ("EulerDiscreteScheduler", {**SCALED, "timestep_type": "continuous", "prediction_type": "v_prediction",
                                "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0}, 8, {}, {}),
    ("EulerDiscreteScheduler", {**SCALED, "use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}, 8, {},
     {}),
    ("HeunDiscreteScheduler", {"beta_schedule": "exp"}, 8, {}, {}),
    ("HeunDiscreteScheduler", SCALED, None, {"timesteps": [900, 500, 100]}, {}),
    ("DPMSolverMultistepScheduler", {**SCALED, "lambda_min_clipped": -1.5}, 12, {}, {}),
    ("DPMSolverMultistepScheduler", {**SCALED, "beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1,
                                     "use_karras_sigmas": True}, 12, {}, {}),
    ("DPMSolverMultistepScheduler", {**SCALED, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, 9,
     {}, {}),
    ("DPMSolverMultistepScheduler", SCALED, None, {"timesteps": [999, 600, 300, 100, 20]}, {}),
    ("DPMSolverMultistepScheduler", {**SCALED, "solver_type": "logrho"}, 8, {}, {}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction",
                                     "use_dynamic_shifting": True}, 8, {"mu": 0.9}, {"mu": 0.9}),
    ("UniPCMultistepScheduler", {**SCALED, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, 9, {},
     {}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "shift_terminal": 0.1,
                                 "use_dynamic_shifting": True, "time_shift_type": "linear"}, 8, {"mu": 2.5},
     {"mu": 2.5}),
    ("UniPCMultistepScheduler", {**SCALED, "use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}, 8, {}, {}),
    ("LCMScheduler", {}, None, {"timesteps": [999, 759, 499, 259]}, {}),
    ("LCMScheduler", {"original_inference_steps": 100}, 8, {}, {}),
    ("TCDScheduler", SCALED, None, {"timesteps": [999, 640, 250, 20, 1]}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, 8, {"mu": 0.9}, {"mu": 0.9}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "time_shift_type": "linear"}, 8, {"mu": 1.7},
     {"mu": 1.7}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, None, {"sigmas": [1.0, 0.75, 0.5, 0.25]}, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, None, {"timesteps": [1000.0, 700.0, 300.0]}, {}),
]


@pytest.mark.parametrize("name,config,steps,set_kwargs,options", EXTRA,
                         ids=[f"{i}-{case[0]}" for i, case in enumerate(EXTRA)])
def test_settings_outside_the_grid_equal_diffusers(name, config, steps, set_kwargs, options) -> None:
    lists = {k: v for k, v in set_kwargs.items() if k in ("timesteps", "sigmas")}
    assert compare(name, config, steps, set_kwargs=set_kwargs, options={**options, **lists}) <= 1e-6


@pytest.mark.parametrize("kwargs", [{"eta": 0.5}, {"eta": 1.0}, {"eta": 0.3, "use_clipped_model_output": True}])
def test_ddim_eta_equals_diffusers(kwargs: dict) -> None:
    assert compare("DDIMScheduler", SCALED, 12, step_kwargs=kwargs, options=kwargs) <= 1e-6


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_tcd_gamma_equals_diffusers(eta: float) -> None:
    assert compare("TCDScheduler", SCALED, 6, step_kwargs={"eta": eta}, options={"eta": eta}) <= 1e-6


@pytest.mark.parametrize("prediction", THREE)
def test_euler_churn_equals_diffusers(prediction: str) -> None:
    kwargs = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.01}
    config = {**SCALED, "prediction_type": prediction}
    assert compare("EulerDiscreteScheduler", config, 12, step_kwargs=kwargs, options=kwargs) <= 1e-6


@pytest.mark.parametrize("name,order", [
    ("DDPMScheduler", 1), ("DDIMScheduler", 1), ("EulerDiscreteScheduler", 1), ("HeunDiscreteScheduler", 2),
    ("KDPM2DiscreteScheduler", 2), ("KDPM2AncestralDiscreteScheduler", 2),
    ("DPMSolverMultistepScheduler", 1), ("UniPCMultistepScheduler", 1), ("DEISMultistepScheduler", 1),
    ("LCMScheduler", 1), ("TCDScheduler", 1), ("FlowMatchEulerDiscreteScheduler", 1),
    ("FlowMatchHeunDiscreteScheduler", 2)])
def test_started_late_equals_diffusers(name: str, order: int) -> None:
    """Image to image: steps skipped as diffusers' pipelines do it, by set_begin_index(t_start * order)."""
    config = {} if name.startswith("FlowMatch") else dict(SCALED)
    assert compare(name, config, 10, begin=6 * order, start=6) <= 1e-6


@pytest.mark.parametrize("name", GRIDS)
def test_unpatched_diffusers_differs_by_its_float32_only(name: str) -> None:
    """diffusers as it is: float32 tables and state. abar is a product of up to 1000 rounded factors, each at most
    half an ulp (2^-24) off, so its relative error is at most 1000 * 2^-24 = 6e-5, and half of that in sigma and in
    the coefficients; the steps (20, slope of the network below one, states divided by sqrt(abar) >= 0.068 at the
    start) are allowed to add that error up once a step."""
    config = {} if name.startswith("FlowMatch") else dict(SCALED)
    if name in ("DDPMScheduler", "DDIMScheduler"):
        config["clip_sample"] = False
    assert compare(name, config, 20, wide=False) <= 20 * 1000 * 2.0**-24


def test_third_order_sde_against_quadrature() -> None:
    """DPM++ 3M SDE by name has no twin in diffusers. Oracle: the exact update of a parabola, integrated
    numerically. The SDE solution over a step is decay * x + 2 alpha' * integral exp(-2 (h - s)) x0(lambda + s) ds;
    the constant and linear parts of the Newton form keep their exact integrals, the quadratic part half of its
    own (the published multistep form: D2 is f[0,1,2] h^2, half of h^2 f''). All from numbers, no phi functions."""
    schedule, steps = Schedule(), 9
    table = make_table(schedule, "dpmpp_3m_sde", steps, lower_order_final=False)
    x, noise = noises(1)[0], noises(steps, 4)
    ours = unfold(table, x, lambda a, t, i: network(a, t), noise)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    levels = np.append(np.interp(table.network_times, np.arange(1000), schedule.train_sigmas), 0.0)
    predictions: list[torch.Tensor] = []
    lam = -np.log(levels[:-1])
    for i in range(steps - 1):
        alpha, alpha_next = (1 / math.sqrt(1 + s**2) for s in levels[i:i + 2])
        sigma, sigma_next = levels[i] * alpha, levels[i + 1] * alpha_next
        predictions.insert(0, (x - sigma * network(x, table.network_times[i])) / alpha)
        h = lam[i + 1] - lam[i]
        s = h / 2 * (nodes + 1)
        kernel = 2 * np.exp(-2 * (h - s)) * h / 2 * weights
        m = predictions
        x0 = kernel.sum() * m[0]
        if i >= 1:
            first = (m[0] - m[1]) / (lam[i] - lam[i - 1])
            slope = first
            if i >= 2:
                second = (first - (m[1] - m[2]) / (lam[i - 1] - lam[i - 2])) / (lam[i] - lam[i - 2])
                slope = first + (lam[i] - lam[i - 1]) * second
                x0 = x0 + 0.5 * (kernel * s**2).sum() * second
            x0 = x0 + (kernel * s).sum() * slope
        x = (sigma_next / sigma * math.exp(-h) * x + alpha_next * x0
             + sigma_next * math.sqrt(1 - math.exp(-2 * h)) * noise[i])
        assert (ours[i] - x).abs().max() < 1e-9


def test_beta_quantiles_equal_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle; the package itself does without")
    p = np.concatenate([[0, 1e-9, 1e-3], np.linspace(0.01, 0.99, 57), [1 - 1e-6, 1]])
    for a in (0.6, 0.9, 1.0, 2.5):
        assert np.abs(beta_quantile(p, a) - stats.beta.ppf(p, a, a)).max() < 1e-12
