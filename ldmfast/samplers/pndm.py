"""PNDM: pseudo numerical methods, with or without the Runge-Kutta start."""

from __future__ import annotations

import itertools

import numpy as np

from ..errors import LdmfastError
from .schedules import Array, Schedule
from .spacing import alpha_at, alphas_at, check_steps, spaced_times
from .step_table import StepTable, TableBuilder

# Adams-Bashforth weights of the newest 1, 2, 3, 4 outputs (Liu et al. 2022, eq. 12, and its lower orders)
WEIGHTS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
           4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def pndm(schedule: Schedule, steps: int | None, *, start: int = 0, skip_prk_steps: bool = True) -> StepTable:
    """Pseudo linear multistep sampling, Liu et al. 2022 (PNDM), algorithm 2, transfer eq. 11; diffusers'
    PNDMScheduler.

    ``skip_prk_steps`` starts with two evaluations of the first step (steps + 1 evaluations in all);
    otherwise the first three steps are pseudo Runge-Kutta steps of four evaluations (algorithm 1; at least 4
    steps). The time lists of PNDM are even by construction: explicit timesteps and sigmas are not taken.
    Started later (image to image) it begins afresh there.
    """
    n = schedule.num_train_timesteps
    count = check_steps(steps, schedule)
    if schedule.prediction_type not in ("epsilon", "v_prediction"):
        raise LdmfastError(f"pndm: prediction_type={schedule.prediction_type!r}, needs epsilon or "
                           f"v_prediction")
    times = spaced_times(schedule, count)
    stride = n // count
    b = TableBuilder("pndm", schedule, registers=5)
    if skip_prk_steps:
        _multistep(b, schedule, times, start, stride, warm=True)
    else:
        if count - start < 4 and count > start:
            raise LdmfastError(f"pndm: {count - start} steps are too few for the Runge-Kutta start, needs at "
                               f"least 4; "
                               "use skip_prk_steps=True")
        _runge_kutta(b, schedule, times[start:start + 4], stride // 2)
        _multistep(b, schedule, times, start + 3, stride, warm=False)
    levels = [(a**0.5, (1 - a) ** 0.5) for a in alphas_at(schedule, times[start:])]
    return b.table(times[start:], levels, 1.0, start)


# registers: r0 the state at the start of a step of several evaluations, r1..r4 older outputs (r1 newest);
# within a Runge-Kutta step r4 is the weighted sum of its outputs

def _multistep(b: TableBuilder, schedule: Schedule, times: Array, start: int, stride: int, *,
               warm: bool) -> None:
    for i in range(start, len(times)):
        time = times[i]
        older = min(3, i - start if warm else 3)
        outputs = [b.e, *b.r[1:1 + older]]
        shift = {1: b.e, 2: b.r[1], 3: b.r[2]}
        e = np.sum([w * o for w, o in zip(WEIGHTS[len(outputs)], outputs)], axis=0)
        if warm and i == start and len(times) > start + 1:
            b.stage(time, transfer(schedule, b.x, b.e, time, time - stride), {0: b.x, 1: b.e}, end=False)
            # the second evaluation is at the next time of the list; the step is redone with the mean slope
            again = times[i + 1]
            mean = (b.e + b.r[1]) / 2
            b.stage(again, transfer(schedule, b.r[0], mean, again + stride, again))
        else:
            b.stage(time, transfer(schedule, b.x, e, time, time - stride), shift)


def _runge_kutta(b: TableBuilder, schedule: Schedule, times: Array, half: int) -> None:
    for time, following in itertools.pairwise(times):
        middle = following + half
        for k, (seen, end) in enumerate([(time, time - half), (middle, middle), (middle, following),
                                         (following, following)]):
            total = RUNGE_KUTTA[k] * b.e + (k > 0) * b.r[4]
            registers = {4: total}
            if k == 0:
                registers |= {0: b.x, 1: b.e, 2: b.r[1], 3: b.r[2]}
            base, slope = b.r[0] if k else b.x, total if k == 3 else b.e
            b.stage(seen, transfer(schedule, base, slope, time, end), registers, end=k == 3)


def transfer(schedule: Schedule, x: Array, e: Array, time: float, end: float) -> Array:
    """Liu et al. 2022, eq. 11: the state at ``end`` from the state and slope at ``time``."""
    a = alpha_at(schedule, time)
    a_end = alpha_at(schedule, end) if end >= 0 else schedule.final_alpha_cumprod
    if schedule.prediction_type == "v_prediction":
        e = a**0.5 * e + (1 - a) ** 0.5 * x
    elif a == 0:
        raise LdmfastError("pndm: epsilon prediction cannot start at zero terminal SNR; use v_prediction")
    if a == 0:
        raise LdmfastError("pndm: the transfer divides by abar, which is zero at zero terminal SNR; use ddim")
    denominator = a * (1 - a_end) ** 0.5 + (a * (1 - a) * a_end) ** 0.5
    return (a_end / a) ** 0.5 * x - (a_end - a) / denominator * e
