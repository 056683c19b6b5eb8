"""diffusers scheduler configs: which class is which solver, and what its keys and defaults are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError, LdmfastError
from .schedules import Schedule

_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
          "trained_betas": None, "prediction_type": "epsilon"}
_K_BETAS = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_RESPACE = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False,
         "time_shift_type": "exponential"}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_SCHEDULED = {"solver_order": 2, "lower_order_final": True}

CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {**_BETAS, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO_SNR,
                      "variance_type": "fixed_small"},
    "DDIMScheduler": {**_BETAS, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO_SNR, "set_alpha_to_one": True},
    "EulerDiscreteScheduler": {
        **_BETAS, **_RESPACE, **_LINSPACE, **_ZERO_SNR, "interpolation_type": "linear", "sigma_min": None,
        "sigma_max": None, "timestep_type": "discrete", "final_sigmas_type": "zero"},
    "EulerAncestralDiscreteScheduler": {**_BETAS, **_LINSPACE, **_ZERO_SNR},
    "HeunDiscreteScheduler": {**_K_BETAS, **_RESPACE, **_LINSPACE, **_CLIP, "clip_sample": False},
    "LMSDiscreteScheduler": {**_BETAS, **_RESPACE, **_LINSPACE},
    "KDPM2DiscreteScheduler": {**_K_BETAS, **_RESPACE, **_LINSPACE},
    "KDPM2AncestralDiscreteScheduler": {**_K_BETAS, **_RESPACE, **_LINSPACE},
    "PNDMScheduler": {**_BETAS, **_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": {
        **_BETAS, **_THRESHOLD, **_RESPACE, **_FLOW, **_LINSPACE, **_ZERO_SNR, **_SCHEDULED,
        "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False,
        "use_lu_lambdas": False, "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf,
        "variance_type": None},
    "UniPCMultistepScheduler": {
        **_BETAS, **_THRESHOLD, **_RESPACE, **_FLOW, **_LINSPACE, **_ZERO_SNR, **_SCHEDULED,
        "predict_x0": True,
        "solver_type": "bh2", "disable_corrector": [], "solver_p": None, "final_sigmas_type": "zero",
        "sigma_min": None, "sigma_max": None, "shift_terminal": None},
    "DEISMultistepScheduler": {
        **_BETAS, **_THRESHOLD, **_RESPACE, **_FLOW, **_LINSPACE, **_SCHEDULED, "algorithm_type": "deis",
        "solver_type": "logrho"},
    "LCMScheduler": {
        **_K_BETAS, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO_SNR, "beta_schedule": "scaled_linear",
        "clip_sample": False, "original_inference_steps": 50, "set_alpha_to_one": True,
        "timestep_scaling": 10.0},
    # its timestep_scaling is read by no line of diffusers'
    "TCDScheduler": {
        **_K_BETAS, **_CLIP, **_THRESHOLD, **_LEADING, **_ZERO_SNR, "beta_schedule": "scaled_linear",
        "clip_sample": False, "original_inference_steps": 50, "set_alpha_to_one": True,
        "timestep_scaling": 10.0},
    "FlowMatchEulerDiscreteScheduler": {
        **_RESPACE, "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False,
        "shift_terminal": None, "time_shift_type": "exponential", "stochastic_sampling": False},
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
}
"""Each class's settings and their defaults, as its constructor has them in diffusers 0.42."""

ALIASES = {"DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler"}

CLASS_TO_SOLVER = {
    "DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a", "HeunDiscreteScheduler": "heun",
    "LMSDiscreteScheduler": "lms",
    "KDPM2DiscreteScheduler": "dpm2", "KDPM2AncestralDiscreteScheduler": "dpm2_a", "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpmpp_2m", "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis", "LCMScheduler": "lcm", "TCDScheduler": "tcd",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
    "FlowMatchHeunDiscreteScheduler": "flow_heun", "DDIMParallelScheduler": "ddim",
    "DDPMParallelScheduler": "ddpm",
}
"""diffusers class -> solver (DPMSolverMultistepScheduler by its algorithm_type and order: ``solver_of``)."""

SOLVER_TO_CLASS = {v: k for k, v in reversed(CLASS_TO_SOLVER.items())} | {
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler", "dpmpp_3m_sde": "DPMSolverMultistepScheduler"}

# config key -> solver option, for the settings that belong to a solver and not to the schedule
_OPTIONS = {"solver_order": "order", "algorithm_type": "algorithm", "solver_type": "solver_type",
            "lower_order_final": "lower_order_final", "euler_at_final": "euler_at_final",
            "predict_x0": "predict_x0",
            "disable_corrector": "disable_corrector", "skip_prk_steps": "skip_prk_steps",
            "variance_type": "variance_type", "original_inference_steps": "original_inference_steps",
            "timestep_scaling": "timestep_scaling", "stochastic_sampling": "stochastic_sampling"}
_SPACING_KEYS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential",
                 "use_beta_sigmas": "beta",
                 "use_lu_lambdas": "lu"}
_PLAIN = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type",
          "timestep_spacing",
          "steps_offset", "set_alpha_to_one", "rescale_betas_zero_snr", "interpolation_type",
          "final_sigmas_type",
          "sigma_min", "sigma_max", "timestep_type", "lambda_min_clipped", "shift", "use_dynamic_shifting",
          "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type",
          "shift_terminal",
          "invert_sigmas", "clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio",
          "sample_max_value")
_ALL_KEYS = {key for defaults in CLASS_DEFAULTS.values() for key in defaults}
# a switched config brings its old class's solver_type and algorithm_type along; diffusers replaces them so
_REPLACED = {"DPMSolverMultistepScheduler": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint",
                                             "deis": "dpmsolver++"},
             "UniPCMultistepScheduler": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"},
             "DEISMultistepScheduler": {k: "logrho" for k in ("midpoint", "heun", "bh1", "bh2")}
             | {"dpmsolver": "deis", "dpmsolver++": "deis"}}


def solver_of(config: Mapping[str, Any]) -> str:
    """The solver a diffusers scheduler config stands for. CheckpointError for an unknown class."""
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASS_TO_SOLVER:
        raise CheckpointError(f"scheduler config: _class_name={name!r} is not supported; give solver= and a "
                              f"config of one of {', '.join(CLASS_DEFAULTS)}")
    solver = CLASS_TO_SOLVER[name]
    if solver == "dpmpp_2m" and str(config.get("algorithm_type", "")).startswith("sde-"):
        return "dpmpp_3m_sde" if config.get("solver_order", 2) == 3 else "dpmpp_2m_sde"
    return solver


def read_config(config: Mapping[str, Any], solver: str | None) -> Schedule:
    """See Schedule.from_config."""
    if not isinstance(config, Mapping):
        raise CheckpointError(f"scheduler config: is a {type(config).__name__}, needs a JSON object")
    own = solver_of(config)
    own_class = str(config["_class_name"])
    own_class = ALIASES.get(own_class, own_class)
    name = solver or own
    if name not in SOLVER_TO_CLASS:
        from .registry import find_solver
        find_solver(name)
    # diffusers has no evodiff, whose grid is DPM-Solver's
    target = SOLVER_TO_CLASS.get(name, "DPMSolverMultistepScheduler")
    defaults = CLASS_DEFAULTS[target]
    given = _given(config, own_class)
    values = {key: given.get(key, default) for key, default in defaults.items()}
    flow = own_class.startswith("FlowMatch") or bool(given.get("use_flow_sigmas"))
    shift = given.get("shift" if own_class.startswith("FlowMatch") else "flow_shift", 1.0)
    values = {k: _REPLACED.get(target, {}).get(v, v) if k in ("solver_type", "algorithm_type") else v
              for k, v in values.items()}
    _refuse(values, target)
    fields = {key: values[key] for key in _PLAIN if key in values}
    fields["shift"] = shift if flow else 1.0
    _check_types(fields)
    if values.get("trained_betas") is not None:
        fields["trained_betas"] = _betas(values["trained_betas"])
    if flow and own_class.startswith("FlowMatch"):
        fields["prediction_type"] = "flow_prediction"
    options = {_OPTIONS[k]: v for k, v in values.items() if k in _OPTIONS}
    options = _solver_options(name, own, options)
    try:
        return Schedule(**fields, sigma_spacing=_spacing(values), flow=flow, solver=name, options=options,
                        config=dict(config))
    except (LdmfastError, TypeError, ValueError) as error:
        raise CheckpointError(f"scheduler config of {own_class}: {error}") from error


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Schedule)}
_MAX_TIMESTEPS = 1 << 20


def _check_types(fields: Mapping[str, Any]) -> None:
    """Each value must have the kind of its field's default: a config is another program's output, or damaged."""
    for key, value in fields.items():
        default = _DEFAULTS[key]
        if isinstance(default, (bool, str)):
            fits = type(value) is type(default)
        elif isinstance(default, int):
            fits = type(value) is int and abs(value) <= _MAX_TIMESTEPS
        else:
            fits = (value is None and default is None) or (
                isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e9) or (
                value == -math.inf == default)
        if not fits:
            raise CheckpointError(f"scheduler config: {key}={repr(value)[:80]} is not a value like {default!r}, in "
                                  "range")


def _betas(values: Any) -> tuple[float, ...]:
    try:
        betas = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        betas = np.zeros(())
    if betas.ndim != 1 or len(betas) > _MAX_TIMESTEPS or not np.isfinite(betas).all():
        raise CheckpointError(f"scheduler config: trained_betas={repr(values)[:80]} is not a list of numbers")
    return tuple(betas.tolist())


def _given(config: Mapping[str, Any], own_class: str) -> dict[str, Any]:
    """The settings a config states, without those diffusers recorded as its class's defaults. A key that no
    class knows may mean anything, so it is refused unless it is off."""
    recorded = set(config.get("_use_default_values") or ())
    given = {}
    for key, value in config.items():
        if key.startswith("_") or key in recorded:
            continue
        if key in _ALL_KEYS:
            given[key] = value
        elif key not in _FOREIGN and value not in (None, False, [], {}):
            raise CheckpointError(f"scheduler config of {own_class}: {key[:80]!r} = {repr(value)[:80]} is not known "
                                  "here; remove it if it does not change the numbers")
    return given


# settings of diffusers classes without a solver here: they mean nothing to the classes above
_FOREIGN = frozenset({
    "noise_sampler_seed", "predictor_order", "corrector_order", "tau_func", "sigma_data", "rho",
    "sigma_schedule",
    "s_noise", "snr_shift_scale", "max_period", "min_period"})


def _refuse(values: Mapping[str, Any], target: str) -> None:
    for key, allowed in (("variance_type", (None, "fixed_small", "fixed_small_log", "fixed_large")),
                         ("solver_p", (None,))):
        if values.get(key) not in allowed:
            raise CheckpointError(f"scheduler config of {target}: {key}={values[key]!r} is not supported")


    if values.get("algorithm_type") == "sde-dpmsolver" and values.get("solver_order") == 3:
        raise CheckpointError(f"scheduler config of {target}: solver_order=3 with "
                              "algorithm_type='sde-dpmsolver' is not supported; use sde-dpmsolver++")


def _spacing(values: Mapping[str, Any]) -> str:
    chosen = [(key, name) for key, name in _SPACING_KEYS.items() if values.get(key)]
    if len(chosen) > 1:
        raise CheckpointError(f"scheduler config: {' and '.join(key for key, _ in chosen)} are both set; "
                              "only one can be")
    return chosen[0][1] if chosen else "default"


def _solver_options(name: str, own: str, options: dict[str, Any]) -> dict[str, Any]:
    """What of a config's options a solver asked for by name keeps: the name fixes algorithm and order."""
    if not name.startswith("dpmpp"):
        return options
    if name == "dpmpp_3m_sde":
        # only a config of this very solver asks for diffusers' numbers in the third order
        if own == name and options["algorithm"] == "sde-dpmsolver++":
            return {**options, "third_order": "diffusers"}
        return {k: v for k, v in options.items() if k != "solver_type"}
    if own != name:
        sde = name == "dpmpp_2m_sde"
        return {**options, "order": 2, "algorithm": "sde-dpmsolver++" if sde else "dpmsolver++"}
    return options
