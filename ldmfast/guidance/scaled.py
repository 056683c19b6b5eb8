"""The scale of classifier-free guidance and of what stands in its place: over steps, noise levels, or both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import LdmfastError
from .guide import COND, UNCOND, Array, Branch, Call, Guidance

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class Scaled(Guidance):
    """Base of the guidances with a scale between the unconditional prediction (0) and beyond the conditional one (1).

    scale: None is the call's guidance_scale. schedule: over the steps of the call: "constant"; "linear" and "cosine"
    rise from 1 to ``scale`` (Wang et al. 2024, "Analysis of Classifier-Free Guidance Weight Schedulers", section 4;
    MDT: Gao et al. 2023, the power-cosine of power 1); or one scale for each step.
    start, stop: fractions of the steps between which there is guidance, as in diffusers' guiders. sigmas: noise levels
    sigma / alpha (lowest, highest) between which there is guidance (Kynkaanniemi et al. 2024, "Applying Guidance in a
    Limited Interval"). Where there is none, only the conditional prediction is evaluated.
    rescale: as the call's guidance_rescale.
    """

    scale: float | None = None
    schedule: str | Sequence[float] = "constant"
    start: float = 0.0
    stop: float = 1.0
    sigmas: tuple[float, float] | None = None
    rescale: float = 0.0

    base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale is not None:
            check_number("scale", self.scale)
        if not isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", numbers("schedule", self.schedule))
        elif self.schedule not in SCHEDULES:
            raise LdmfastError(f"schedule={self.schedule!r} is unknown: use one of {', '.join(SCHEDULES)}, or a list "
                               "of one scale for each step")
        check_range(self.start, self.stop)
        if self.sigmas is not None:
            pair = numbers("sigmas", self.sigmas)
            if len(pair) != 2 or not 0 <= pair[0] <= pair[1]:
                raise LdmfastError(f"sigmas={self.sigmas!r} must be two noise levels, 0 or more, the lower first")
            object.__setattr__(self, "sigmas", pair)
        check_number("rescale", self.rescale, 0.0)

    def scales(self, call: Call) -> Array:
        """(stages,) the scale of each evaluation, 1 where there is no guidance. Raises LdmfastError for a list of
        another length than the call's steps."""
        w, steps = call.scale if self.scale is None else float(self.scale), call.table.num_steps
        if not isinstance(self.schedule, str):
            if len(self.schedule) != steps:
                raise LdmfastError(f"schedule has {len(self.schedule)} scales for {steps} steps; give one for each")
            by_step = np.asarray(self.schedule, dtype=np.float64)
        else:
            u = np.linspace(0, 1, steps) if steps > 1 else np.ones(steps)
            risen = {"constant": np.ones(steps), "linear": u, "cosine": (1 - np.cos(math.pi * u)) / 2}[self.schedule]
            by_step = np.where(risen == 1, w, 1 + (w - 1) * risen)
        return np.where(self.active(call), by_step[call.step], 1.0)

    def active(self, call: Call) -> Array:
        """(stages,) bool: inside both intervals."""
        on = call.within(self.start, self.stop)
        if self.sigmas is None:
            return on
        alpha, sigma = call.levels.T
        low, high = self.sigmas
        return on & (sigma >= low * alpha) & (sigma <= high * alpha)

    def instead(self, scales: Array) -> dict[Branch, Array]:
        """terms() of a guidance that is not linear: it takes the conditional prediction's place where its scale is not
        1."""
        return {COND: np.where(scales != 1, -1.0, 0.0)}

    def both(self, scales: Array) -> dict[Branch, Array]:
        """reads() of such a one."""
        return {UNCOND: scales != 1, COND: scales != 1}


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """Raises LdmfastError for a value that is not a finite number between the two."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not (
            least <= value <= most):
        bounds = "" if least == -math.inf else f" of at least {least:g}" if most == math.inf else (
            f" between {least:g} and {most:g}")
        raise LdmfastError(f"{name}={value!r} is not a finite number{bounds}")
    return float(value)


def check_range(start: Any, stop: Any) -> None:
    """Two fractions of the steps. Raises LdmfastError."""
    check_number("start", start, 0.0, 1.0)
    check_number("stop", stop, 0.0, 1.0)
    if start > stop:
        raise LdmfastError(f"start={start!r} lies behind stop={stop!r}: both are fractions of the steps, start first")


def numbers(name: str, values: Any) -> tuple[float, ...]:
    """The finite numbers of a list. Raises LdmfastError."""
    try:
        found = () if isinstance(values, (str, bytes)) else tuple(float(v) for v in values)
    except (TypeError, ValueError):
        found = ()
    if not found or not all(math.isfinite(v) for v in found):
        raise LdmfastError(f"{name}={values!r} must be a list of finite numbers")
    return found
