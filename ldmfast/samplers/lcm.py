"""LCM: multistep sampling of a latent consistency model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import LdmfastError
from .schedules import Array, Schedule
from .spacing import alphas_at, check_list, check_steps
from .step_table import StepTable, TableBuilder

SIGMA_DATA = 0.5


def lcm(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None, start: int = 0, original_inference_steps: int = 50,
        timestep_scaling: float = 10.0) -> StepTable:
    """Multistep consistency sampling, Luo et al. 2023 (LCM), algorithm 3; diffusers' LCMScheduler.

    Each step predicts the clean picture c_skip(t) x + c_out(t) x0 (boundary scalings of Song et al. 2023,
    appendix C, in the scaled time ``timestep_scaling`` t with sigma_data 0.5) and noises it to the next time
    with fresh noise; the last step does not. The times are a subset of the ``original_inference_steps``
    times of the distillation.
    """
    times = consistency_times("lcm", schedule, steps, timesteps, sigmas, original_inference_steps)
    alphas = alphas_at(schedule, times)
    b = TableBuilder("lcm", schedule, clips=True)
    for i in range(start, len(times)):
        a = alphas[i]
        x0, _ = b.predict(a**0.5, (1 - a) ** 0.5)
        scaled = times[i] * timestep_scaling
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        row = c_out * x0 + c_skip * b.x
        if i < len(times) - 1:
            row = alphas[i + 1] ** 0.5 * row + (1 - alphas[i + 1]) ** 0.5 * b.noise
        b.stage(times[i], row)
    return b.table(times[start:], [(a**0.5, (1 - a) ** 0.5) for a in alphas[start:]], 1.0, start)


def consistency_times(solver: str, schedule: Schedule, steps: int | None, timesteps: Sequence[float] | None,
                      sigmas: Sequence[float] | None, original: int) -> Array:
    """The falling times of a consistency sampler: those given, or ``steps`` of the ``original`` ones of the
    distillation, evenly. Raises LdmfastError."""
    if sigmas is not None:
        raise LdmfastError(f"{solver}: takes timesteps, not sigmas (a consistency model knows its training times "
                           "only)")
    n = schedule.num_train_timesteps
    if timesteps is not None:
        return check_list(timesteps, "timesteps", 0, n - 1)
    count = check_steps(steps, schedule)
    if not 1 <= original <= n:
        raise LdmfastError(f"{solver}: original_inference_steps={original} is not in 1..{n}")
    if count > original:
        raise LdmfastError(f"{solver}: steps={count} is more than the {original} original_inference_steps")
    trained = (np.arange(1, original + 1) * (n // original) - 1)[::-1]
    return trained[np.floor(np.linspace(0, original, count, endpoint=False)).astype(np.int64)].astype(np.float64)
