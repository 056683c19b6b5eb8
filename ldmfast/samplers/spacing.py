"""Where a run's steps lie: times and noise levels of each solver family, as diffusers spaces them.

Every function returns a Grid. The three families of diffusers space differently on purpose or by history;
pictures of a given seed depend on it, so each is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import LdmfastError
from .schedules import Array, Schedule


@dataclass(frozen=True, eq=False)
class Grid:
    """times: (steps,) what the network sees. sigmas: (steps + 1,) noise levels, the last where the run ends.

    For the grids of training timesteps, alphas holds abar at the step starts and prev_alphas where each ends.
    """

    times: Array
    sigmas: Array
    alphas: Array
    prev_alphas: Array


def check_steps(steps: int | None, schedule: Schedule | None = None) -> int:
    """``steps`` as a positive int, at most the training timesteps if a schedule is given; or LdmfastError."""
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise LdmfastError(f"steps={steps!r}, needs a positive integer (or give timesteps= or sigmas=)")
    if steps < 1:
        raise LdmfastError(f"steps={steps}, must be at least 1")
    if schedule is not None and steps > schedule.num_train_timesteps:
        raise LdmfastError(f"steps={steps} is more than the model's {schedule.num_train_timesteps} training "
                           "timesteps; use fewer")
    return int(steps)


def check_list(values: Sequence[float], what: str, low: float, high: float) -> Array:
    """``values`` as a strictly falling float64 list within [low, high], or LdmfastError."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise LdmfastError(f"{what}: needs a flat list with at least one number, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise LdmfastError(f"{what}: {array[~np.isfinite(array)][0]} is not finite")
    rising = np.flatnonzero(np.diff(array) >= 0)
    if rising.size:
        i = int(rising[0])
        raise LdmfastError(f"{what}: must fall strictly, but {array[i]:g} is followed by {array[i + 1]:g}")
    if array[0] > high or array[-1] < low:
        value = array[0] if array[0] > high else array[-1]
        raise LdmfastError(f"{what}: {value:g} is not in [{low:g}, {high:g}]")
    return array


def spaced_times(schedule: Schedule, steps: int, *, extra: int = 0, whole: bool = True) -> Array:
    """(steps,) falling training timesteps. ``extra`` = 1 spaces steps + 1 and leaves the last away, so that
    the run does not end on it; ``whole`` rounds the linspace times."""
    n, total = schedule.num_train_timesteps, steps + extra
    last = n
    if extra and math.isfinite(schedule.lambda_min_clipped):
        log_snr = -np.log(schedule.train_sigmas)[::-1]
        last = n - int(np.searchsorted(log_snr, schedule.lambda_min_clipped))
    times: Array
    if schedule.timestep_spacing == "linspace":
        times = np.linspace(0, last - 1, total, dtype=np.float64)[::-1]
        times = np.array(times.round() if whole else times, dtype=np.float64)
    elif schedule.timestep_spacing == "leading":
        if total > last:
            raise LdmfastError(f"steps={steps} is too many for leading spacing of {last} training timesteps; "
                               f"use at most {last - extra}, or another timestep_spacing")
        times = np.array(np.arange(total) * (last // total), dtype=np.float64)[::-1] + schedule.steps_offset
    else:
        # arange may make one time more than asked when n / steps rounds down
        times = np.array(np.arange(last, 0, -n / steps).round()[:steps] - 1, dtype=np.float64)
    times = times[:steps]
    if times[0] > n - 1 or times[-1] < 0:
        raise LdmfastError(f"steps={steps} with {schedule.timestep_spacing} spacing and steps_offset="
                           f"{schedule.steps_offset} reaches timestep {times[0]:g}; the model has 0..{n - 1}")
    return np.ascontiguousarray(times, dtype=np.float64)


def alpha_at(schedule: Schedule, time: float) -> float:
    """abar at one training timestep."""
    return float(alphas_at(schedule, np.array([time]))[0])


def alphas_at(schedule: Schedule, times: Array) -> Array:
    """abar at training timesteps; between two of them sigma is interpolated linearly."""
    n = schedule.num_train_timesteps
    whole = np.equal(times, np.round(times))
    sigmas = np.interp(times, np.arange(n), schedule.train_sigmas)
    exact = schedule.alphas_cumprod[np.clip(np.round(times), 0, n - 1).astype(np.int64)]
    return np.where(whole, exact, 1 / (1 + sigmas**2))


def training_grid(schedule: Schedule, steps: int | None, timesteps: Sequence[float] | None,
                  sigmas: Sequence[float] | None, *, next_in_list: bool, final_alpha: float) -> Grid:
    """Grid of DDPM and DDIM. A step ends at the next time of the list (DDPM), or, as diffusers' DDIM does,
    num_train_timesteps // steps below its start, which differs for linspace and trailing. A given list is
    followed as given."""
    n = schedule.num_train_timesteps
    if sigmas is not None:
        levels = explicit_sigmas(sigmas)
        abar = 1 / (1 + levels**2)
        times = sigma_to_time(levels[:-1], schedule)
        return Grid(times, levels, abar[:-1], abar[1:])
    if timesteps is not None:
        times, next_in_list = check_list(timesteps, "timesteps", 0, n - 1), True
    else:
        times = spaced_times(schedule, check_steps(steps, schedule))
    alphas = alphas_at(schedule, times)
    if next_in_list:
        prev = np.append(alphas[1:], final_alpha)
    else:
        ends = times - n // len(times)
        prev = np.where(ends >= 0, alphas_at(schedule, np.maximum(ends, 0)), final_alpha)
    with np.errstate(divide="ignore"):
        levels = np.sqrt(np.append(1 / alphas - 1, 1 / prev[-1] - 1))
    return Grid(times, levels, alphas, prev)


def one_step_grid(schedule: Schedule, time: int, end: int, final_alpha: float) -> Grid:
    """The single step from training timestep ``time`` to ``end``; an end below 0 is at abar ``final_alpha``."""
    n = schedule.num_train_timesteps
    if not 0 <= time < n or end >= n:
        raise LdmfastError(f"timestep {time if not 0 <= time < n else end} is not in the model's 0..{n - 1}")
    abar, end_abar = alpha_at(schedule, time), final_alpha if end < 0 else alpha_at(schedule, end)
    with np.errstate(divide="ignore"):
        levels = np.sqrt(1 / np.array([abar, end_abar]) - 1)
    return Grid(np.array([float(time)]), levels, np.array([abar]), np.array([end_abar]))


def explicit_sigmas(sigmas: Sequence[float]) -> Array:
    """A given sigma list: steps + 1 falling values, the last (often 0) is where the run ends; it may repeat the one
    before (an idle step)."""
    if np.size(sigmas) < 2:
        raise LdmfastError("sigmas: needs at least two values, the start and the end of one step")
    idle = sigmas[-1] == sigmas[-2]
    levels = check_list(sigmas[:-1] if idle else sigmas, "sigmas", 0, math.inf)
    return np.append(levels, levels[-1]) if idle else levels


def sigma_grid(schedule: Schedule, steps: int | None, timesteps: Sequence[float] | None,
               sigmas: Sequence[float] | None, *, round_karras: bool = False,
               ends_at_zero: bool = True) -> Grid:
    """Grid of the sigma-space solvers (Euler, Heun, LMS, DPM2): the respaced range runs between the sigmas of
    the first and last spaced time."""
    n = schedule.num_train_timesteps
    if sigmas is not None:
        levels = explicit_sigmas(sigmas)
        return _vp_grid(sigma_to_time(levels[:-1], schedule), levels)
    if timesteps is not None:
        _refuse_respacing(schedule, "timesteps")
        times = check_list(timesteps, "timesteps", 0, n - 1)
    else:
        times = spaced_times(schedule, check_steps(steps), whole=False)
    levels = np.interp(times, np.arange(n), schedule.train_sigmas)
    if schedule.interpolation_type == "log_linear":
        train = schedule.train_sigmas
        levels = np.exp(np.linspace(math.log(train[-1]), math.log(train[0]), len(times) + 1))
    if schedule.sigma_spacing != "default":
        levels = respace(schedule, levels[0], levels[-1], len(times))
        times = sigma_to_time(levels, schedule)
        times = times.round() if round_karras and schedule.sigma_spacing == "karras" else times
    last = schedule.train_sigmas[0] if not ends_at_zero and schedule.final_sigmas_type == "sigma_min" else 0.0
    levels = np.append(levels, last)[:len(times) + 1]
    return _vp_grid(times, levels)


def log_snr_grid(schedule: Schedule, steps: int | None, timesteps: Sequence[float] | None,
                 sigmas: Sequence[float] | None, *, last: str, round_karras: bool) -> Grid:
    """Grid of DPM-Solver, UniPC and DEIS: whole times, the respaced range is the whole training range.

    ``last``: where the run ends; "config" as final_sigmas_type says, "repeat" repeats the last respaced sigma
    (diffusers' DEIS), "unipc" ends at it for sigma_min.
    """
    n = schedule.num_train_timesteps
    train = schedule.train_sigmas
    if sigmas is not None:
        levels = explicit_sigmas(sigmas)
        return _vp_grid(sigma_to_time(levels[:-1], schedule), levels)
    if timesteps is not None:
        _refuse_respacing(schedule, "timesteps")
        times = check_list(timesteps, "timesteps", 0, n - 1)
    else:
        times = spaced_times(schedule, check_steps(steps), extra=1)
    levels = np.interp(times, np.arange(n), train)
    final = 0.0 if last != "repeat" and schedule.final_sigmas_type == "zero" else float(train[0])
    if schedule.sigma_spacing != "default":
        levels = respace(schedule, train[-1], train[0], len(times))
        times = sigma_to_time(levels, schedule)
        rounds = schedule.sigma_spacing in ("karras", "lu") and round_karras
        times = times.round() if rounds else np.trunc(times)
        if last == "repeat" or (last == "unipc" and schedule.final_sigmas_type == "sigma_min"):
            final = float(levels[-1])
    # many steps over few training times repeat some: idle steps, which these solvers know
    return _vp_grid(times, np.append(levels, final), strict=False)


def _vp_grid(times: Array, levels: Array, strict: bool = True) -> Grid:
    if math.isclose(levels[-1], levels[-2], rel_tol=1e-12):
        levels[-1] = levels[-2]  # an end that repeats the last start, but for rounding
    steps = np.diff(levels[:-1])
    if ((steps >= 0) if strict else (steps > 0)).any() or levels[-1] > levels[-2]:
        raise LdmfastError(f"steps={len(times)}: the noise levels do not fall ({len(times)} steps are too "
                           "many for this spacing, or sigma_min and sigma_max are exchanged)")
    abar = 1 / (1 + levels**2)
    return Grid(np.asarray(times, dtype=np.float64), levels, abar[:-1], abar[1:])


def _refuse_respacing(schedule: Schedule, what: str) -> None:
    if schedule.sigma_spacing != "default":
        raise LdmfastError(f"{what} cannot be given together with {schedule.sigma_spacing} sigmas; "
                           "give one of them")


def respace(schedule: Schedule, sigma_max: float, sigma_min: float, n: int) -> Array:
    """(n,) sigmas spread by ``schedule.sigma_spacing`` over the range (the schedule's own sigma_min and
    sigma_max go before the ones given).

    karras: Karras et al. 2022, eq. 5, rho = 7. exponential: even in log sigma. beta: quantiles of Beta(0.6,
    0.6) (Lee et al. 2024). lu: even in log SNR (Lu et al. 2022).
    """
    lo = float(sigma_min if schedule.sigma_min is None else schedule.sigma_min)
    hi = float(sigma_max if schedule.sigma_max is None else schedule.sigma_max)
    if not 0 < lo <= hi or not math.isfinite(hi):
        raise LdmfastError(f"schedule: sigma range {lo:g}..{hi:g} is not a range of positive numbers")
    ramp: Array = np.linspace(0, 1, n, dtype=np.float64)
    if schedule.sigma_spacing == "karras":
        return (hi ** (1 / 7) + ramp * (lo ** (1 / 7) - hi ** (1 / 7))) ** 7
    if schedule.sigma_spacing == "beta":
        return lo + beta_quantile(1 - ramp, 0.6) * (hi - lo)
    if schedule.sigma_spacing == "lu":
        # from log sigma_max to log sigma_min of the training range, whatever sigma_min and sigma_max say
        hi, lo = float(sigma_max), float(sigma_min)
    return np.exp(np.linspace(math.log(hi), math.log(lo), n))


def beta_quantile(p: Array, a: float) -> Array:
    """Quantiles of Beta(a, a), by bisection on the series of the incomplete beta integral.

    For x <= 1/2, B(x; a, b) = x^a sum_n (1-b)_n / n! x^n / (a + n), whose terms fall like 2^-n.
    """
    terms = np.arange(70)
    pochhammer = np.concatenate([[1.0], np.cumprod((np.arange(69) + 1 - a) / (np.arange(69) + 1))])
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)

    def lower(x: Array) -> Array:
        return x**a * (pochhammer / (a + terms) * x[:, None] ** terms).sum(axis=1) / whole

    p = np.asarray(p, dtype=np.float64)
    q = np.minimum(p, 1 - p)  # the law is symmetric: solve in the lower half
    lo, hi = np.zeros_like(q), np.full_like(q, 0.5)
    for _ in range(80):
        mid = (lo + hi) / 2
        below = lower(mid) < q
        lo, hi = np.where(below, mid, lo), np.where(below, hi, mid)
    x = np.where(q <= 0, 0.0, (lo + hi) / 2)
    return np.where(p <= 0.5, x, 1 - x)


def sigma_to_time(sigmas: Array, schedule: Schedule) -> Array:
    """Training time of each sigma, linear in log sigma between two timesteps, clamped to the ends."""
    n = schedule.num_train_timesteps
    logs = np.log(np.maximum(sigmas, 1e-10))
    return np.interp(logs, np.log(schedule.train_sigmas), np.arange(n, dtype=np.float64))


def shifted(schedule: Schedule, sigmas: Array) -> Array:
    """The flow time shift s t / (1 + (s - 1) t) (Esser et al. 2024, eq. 23)."""
    return schedule.shift * sigmas / (1 + (schedule.shift - 1) * sigmas)


def stretched(schedule: Schedule, sigmas: Array) -> Array:
    """Sigmas stretched so that the last one is ``shift_terminal``."""
    if not schedule.shift_terminal:
        return sigmas
    rest = 1 - sigmas
    if rest[-1] == 0:
        raise LdmfastError(f"shift_terminal={schedule.shift_terminal} cannot stretch a list that ends at sigma 1; "
                           "use at least 2 steps")
    return 1 - rest / (rest[-1] / (1 - schedule.shift_terminal))


def flow_grid(schedule: Schedule, steps: int | None, timesteps: Sequence[float] | None,
              sigmas: Sequence[float] | None, *, kind: str) -> Grid:
    """Grid of the rectified-flow solvers; network times are sigma * num_train_timesteps.

    ``kind`` says whose spacing: "match" (FlowMatchEuler and FlowMatchHeun), "dpm" (DPM-Solver), "deis" (the
    same, the last sigma repeated) or "unipc". Given lists hold the steps' starts only and are shifted, as in
    diffusers; the end is added.
    """
    n = schedule.num_train_timesteps
    times: Array | None = None
    if sigmas is not None:
        levels = shifted(schedule, check_list(sigmas, "sigmas", 1e-9, 1))
    elif timesteps is not None:
        times = check_list(timesteps, "timesteps", 1e-9, n)
        levels = shifted(schedule, times / n)
    else:
        levels = _flow_levels(schedule, check_steps(steps), kind)
    levels = stretched(schedule, levels) if kind in ("match", "unipc") else levels
    if schedule.sigma_spacing != "default":
        if kind == "match":
            levels = respace(schedule, levels[0], levels[-1], len(levels))
        elif kind == "unipc" and schedule.sigma_spacing == "karras":
            train = schedule.train_sigmas
            levels = respace(schedule, train[-1], train[0], len(levels))
            levels = levels / (levels + 1)
        else:
            raise LdmfastError(f"schedule: {schedule.sigma_spacing} sigmas are not defined for flow levels "
                               "with this solver; use sigma_spacing='default' or a flow_ solver")
    elif kind == "unipc" and abs(levels[0] - 1) < 1e-6:
        levels[0] -= 1e-6  # lambda is infinite at sigma 1
    if (np.diff(levels) >= 0).any():
        raise LdmfastError(f"steps={len(levels)}: the flow sigmas do not fall; use fewer steps")
    if times is None:
        times = levels * n if kind == "match" else np.trunc(levels * n)
    if schedule.invert_sigmas and kind == "match":
        levels = 1 - levels
        return Grid(levels * n, np.append(levels, 1.0), 1 - levels, np.append(1 - levels[1:], 0.0))
    final = 0.0
    if kind == "deis" or (kind == "unipc" and schedule.final_sigmas_type == "sigma_min"):
        final = float(levels[-1])
    elif kind == "dpm" and schedule.final_sigmas_type == "sigma_min":
        final = float(schedule.train_sigmas[0])
    full = np.append(levels, final)
    return Grid(times, full, 1 - full[:-1], 1 - full[1:])


def _flow_levels(schedule: Schedule, steps: int, kind: str) -> Array:
    n = schedule.num_train_timesteps
    even: Array = np.linspace(1, 1 / n, steps + 1, dtype=np.float64)
    if kind == "match":
        # the range ends at the already shifted sigma of training time 1, and is shifted again below
        low = 1 / n if schedule.use_dynamic_shifting else float(shifted(schedule, np.array(1 / n)))
        return shifted(schedule, np.linspace(1.0, low, steps, dtype=np.float64))
    if kind == "unipc":
        return shifted(schedule, even[:-1])
    return shifted(schedule, 1 - even)[::-1][:-1].copy()
