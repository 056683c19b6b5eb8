"""Solver names, and the one function that makes a table from a name."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import LdmfastError
from .ddim import ddim
from .ddpm import ddpm
from .deis import deis
from .dpm2 import dpm2, dpm2_a
from .dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde
from .euler import euler, euler_a
from .evodiff import evodiff
from .flow import flow_euler, flow_heun
from .heun import heun
from .lcm import lcm
from .lms import lms
from .pndm import pndm
from .schedules import Schedule
from .step_table import StepTable
from .tcd import tcd
from .unipc import unipc

SOLVERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ddpm, "ddim": ddim, "euler": euler, "euler_a": euler_a, "heun": heun, "lms": lms, "pndm": pndm,
    "dpmpp_2m": dpmpp_2m, "dpmpp_2m_sde": dpmpp_2m_sde, "dpmpp_3m_sde": dpmpp_3m_sde, "dpm2": dpm2,
    "dpm2_a": dpm2_a, "unipc": unipc, "deis": deis, "evodiff": evodiff, "lcm": lcm, "tcd": tcd,
    "flow_euler": flow_euler, "flow_heun": flow_heun,
}
"""Solver name -> function(schedule, steps, *, timesteps, sigmas, start, its own options) -> StepTable."""

FLOW_ONLY = ("flow_euler", "flow_heun")
EITHER = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "deis")
_COMMON = ("schedule", "steps", "timesteps", "sigmas", "start")


def find_solver(name: str) -> Callable[..., StepTable]:
    """The solver's function; an unknown name raises LdmfastError with the nearest and all known names."""
    if name in SOLVERS:
        return SOLVERS[name]
    near = difflib.get_close_matches(str(name).lower(), SOLVERS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise LdmfastError(f"unknown solver {name!r}; {hint}known: {', '.join(SOLVERS)}")


def solver_options(name: str) -> tuple[str, ...]:
    """The options a solver takes beyond the common ones."""
    return tuple(p for p in inspect.signature(find_solver(name)).parameters if p not in _COMMON)


def start_step(steps: int, strength: float, *, flow: bool = False) -> int:
    """Steps to skip for image to image: the last int(steps * strength) steps run, as in diffusers'
    get_timesteps (its flow pipelines round the other way). Strength 0 runs none: the source comes back.
    LdmfastError outside [0, 1]."""
    if not (isinstance(strength, (int, float)) and 0 <= strength <= 1):
        raise LdmfastError(f"strength={strength}, must be in [0, 1]")
    if flow:
        return int(max(steps - min(steps * strength, steps), 0))
    return max(steps - min(int(steps * strength), steps), 0)


def make_table(schedule: Schedule, solver: str | None = None, steps: int | None = None, *,
               timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None,
               network_times: Sequence[float] | Callable[[float], float] | None = None,
               epsilon_scale: float | tuple[float, float] = 1.0, strength: float | None = None, start: int = 0,
               mu: float | None = None, image_seq_len: int | None = None,
               guidance: float | Sequence[float] | None = None, **options: Any) -> StepTable:
    """The step table of a run.

    solver: a name of SOLVERS; None takes the one of the schedule's config. One of ``steps``, ``timesteps``
    (falling, training times) or ``sigmas`` (falling; with the run's end as last value, for flow schedules
    without).
    network_times: what the network is told instead, one a step or one a stage, or a function of its time.
    epsilon_scale: lambda, or (constant, slope), of Schedule.epsilon_scale: noise predictions are divided by it.
    strength in [0, 1], or start: skip the first steps (image to image).
    mu, or image_seq_len (latent patches): fix a dynamic shift.
    guidance: as in StepTable.with_guidance. options: the solver's own (``solver_options``).
    Raises LdmfastError, one line each, for whatever does not fit.
    """
    name = solver or schedule.solver
    if name is None:
        raise LdmfastError(f"make_table: no solver given; known: {', '.join(SOLVERS)}")
    function = find_solver(name)
    schedule = schedule.for_solver(name)
    if timesteps is not None and sigmas is not None:
        raise LdmfastError("make_table: both timesteps and sigmas are given; give one (network_times= sets "
                           "what the network sees)")
    given = timesteps is not None or sigmas is not None
    count = _check_length(timesteps, sigmas, steps, schedule.flow) if given else steps
    if count is None:
        raise LdmfastError("make_table: needs steps, timesteps or sigmas")
    _check_kind(name, schedule)
    schedule = _scale_epsilon(name, schedule, epsilon_scale)
    schedule = _fix_shift(schedule, mu, image_seq_len)
    known = solver_options(name)
    for option in options:
        if option not in known:
            raise LdmfastError(f"{name}: unknown option {option!r}; it takes {', '.join(known) or 'none'}")
    settings = {k: v for k, v in schedule.options.items() if k in known} | options
    if strength is not None:
        if start:
            raise LdmfastError(f"make_table: both strength={strength} and start={start} are given; give one")
        start = start_step(count, strength, flow=schedule.flow)
    if isinstance(count, int) and count > 0 and not 0 <= start <= count:
        raise LdmfastError(f"make_table: start={start} is not in 0..{count}")
    if given:
        settings |= {"timesteps": timesteps, "sigmas": sigmas}
    table = _call(name, function, schedule, None if given else steps, start, settings)
    if network_times is not None:
        table = table.with_network_times(network_times)
    return table if guidance is None else table.with_guidance(guidance)


def _call(name: str, function: Callable[..., StepTable], schedule: Schedule, steps: int | None, start: int,
          settings: dict[str, Any]) -> StepTable:
    parameters = inspect.signature(function).parameters
    for option in ("timesteps", "sigmas"):
        if settings.get(option) is None:
            settings.pop(option, None)
        elif option not in parameters:
            raise LdmfastError(f"{name}: does not take {option}; give steps")
    return function(schedule, steps, start=start, **settings)


def _check_length(timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, steps: int | None,
                  flow: bool) -> int:
    count = len(timesteps) if timesteps is not None else len(sigmas or ()) - (not flow)
    if steps is not None and steps != count:
        what = "timesteps" if timesteps is not None else "sigmas"
        raise LdmfastError(f"make_table: steps={steps}, but the {what} list makes {count} steps; leave "
                           "one out")
    return count


def _check_kind(name: str, schedule: Schedule) -> None:
    if schedule.flow and name not in FLOW_ONLY + EITHER:
        raise LdmfastError(f"{name} works on variance-preserving noise, this schedule is a rectified flow; "
                           f"use one of {', '.join(s for s in FLOW_ONLY + EITHER if s in SOLVERS)}")
    if not schedule.flow and name in FLOW_ONLY:
        raise LdmfastError(f"{name} needs a rectified-flow schedule (flow=True, "
                           f"prediction_type='flow_prediction'), this one predicts "
                           f"{schedule.prediction_type}; use for example {name.removeprefix('flow_')}")


def _scale_epsilon(name: str, schedule: Schedule, scale: float | tuple[float, float]) -> Schedule:
    constant, slope = scale if isinstance(scale, (tuple, list)) else (scale, 0.0)
    if (constant, slope) == (1, 0):
        return schedule
    if not (min(constant, constant + slope) > 0 and math.isfinite(constant + slope)):
        raise LdmfastError(f"make_table: epsilon_scale={scale} must stay positive over the training times 0 to 1")
    if name in (*FLOW_ONLY, "pndm"):
        raise LdmfastError(f"{name} adds up the network's outputs as they are; for epsilon_scale use dpmpp_2m, or "
                           "leave it out")
    return replace(schedule, epsilon_scale=(float(constant), float(slope)))


def _fix_shift(schedule: Schedule, mu: float | None, image_seq_len: int | None) -> Schedule:
    if not schedule.use_dynamic_shifting:
        if mu is not None:
            raise LdmfastError(f"make_table: mu={mu}, but the schedule's shift is fixed ({schedule.shift}); "
                               "set use_dynamic_shifting=True, or leave mu out")
        return schedule
    if mu is None and image_seq_len is None:
        raise LdmfastError("make_table: the schedule's shift depends on the picture size; give "
                           "image_seq_len= (number of latent patches) or mu=")
    value = schedule.mu(image_seq_len) if mu is None and image_seq_len is not None else mu
    if value is None or not math.isfinite(value):
        raise LdmfastError(f"make_table: mu={value} is not finite")
    return schedule.with_mu(value)
