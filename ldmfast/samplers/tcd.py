"""TCD: strategic stochastic sampling of a trajectory consistency model, and phased consistency jumps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import LdmfastError
from .lcm import consistency_times
from .schedules import Schedule
from .spacing import alphas_at
from .step_table import StepTable, TableBuilder


def tcd(schedule: Schedule, steps: int | None, *, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None, start: int = 0, eta: float = 0.3,
        original_inference_steps: int = 50) -> StepTable:
    """Strategic stochastic sampling, Zheng et al. 2024 (TCD), algorithm 4; diffusers' TCDScheduler.

    From t to the next time t' of the list: a deterministic jump t -> s = floor((1 - eta) t'), then fresh noise
    s -> t'. ``eta`` is the paper's gamma: 0 jumps along the trajectory (DDIM; with a list whose times are the edges of
    the phases this samples a phased consistency model, Wang et al. 2024 (PCM), which takes eta 0), 1 noises from the
    clean end as LCM does. The last step goes to time 0 and adds none. The times are those of ``lcm``, or a falling
    list of 1 or more.
    Raises LdmfastError for eta outside [0, 1], sigmas, and lists or steps that do not fit.
    """
    if not 0 <= eta <= 1:
        raise LdmfastError(f"tcd: eta={eta}, must be in [0, 1]")
    times = consistency_times("tcd", schedule, steps, timesteps, sigmas, original_inference_steps)
    ends = np.append(times[1:], 0.0)
    # a float32 product: diffusers forms it so, and at whole products the last bit decides the floor
    jumps = np.floor(np.float32(1 - eta) * ends.astype(np.float32)).astype(np.float64)
    alphas, to, end = alphas_at(schedule, times), alphas_at(schedule, jumps), alphas_at(schedule, ends)
    b = TableBuilder("tcd", schedule)
    for i in range(start, len(times)):
        x0, eps = b.predict(alphas[i]**0.5, (1 - alphas[i]) ** 0.5)
        row = to[i]**0.5 * x0 + (1 - to[i]) ** 0.5 * eps
        if eta > 0 and i < len(times) - 1:
            kept = end[i] / to[i]
            row = kept**0.5 * row + (1 - kept) ** 0.5 * b.noise
        b.stage(times[i], row)
    return b.table(times[start:], [(a**0.5, (1 - a) ** 0.5) for a in alphas[start:]], 1.0, start)
