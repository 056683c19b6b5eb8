"""Noise schedules: what a diffusers scheduler config says about noise levels, in float64.

A schedule knows the training noise levels and how a run's steps are spread over them; it knows no solver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import LdmfastError

Array = npt.NDArray[np.float64]

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
SPACINGS = ("leading", "trailing", "linspace")
SIGMA_SPACINGS = ("default", "karras", "exponential", "beta", "lu")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")

_CHOICES = {
    "prediction_type": PREDICTIONS,
    "timestep_spacing": SPACINGS,
    "sigma_spacing": SIGMA_SPACINGS,
    "beta_schedule": BETA_SCHEDULES,
    "interpolation_type": ("linear", "log_linear"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_type": ("discrete", "continuous"),
    "time_shift_type": ("exponential", "linear"),
}

# alphas_cumprod[-1] where a solver needs a finite sigma (sigma = 4096), as in diffusers
ZERO_SNR_FLOOR = 2.0**-24


@dataclass(frozen=True)
class Schedule:
    """The noise levels of one model. Names and meaning of the fields are those of diffusers' scheduler
    configs.

    ``flow`` selects rectified-flow levels x = (1 - sigma) x0 + sigma noise; otherwise the levels are
    variance preserving, x = sqrt(abar) x0 + sqrt(1 - abar) noise (Ho et al. 2020, eq. 4), and
    sigma = sqrt((1 - abar) / abar). ``sigma_spacing`` spreads the sigmas of the sigma-space solvers.
    ``epsilon_scale`` is the lambda of Ning et al. 2024 that predicted noise is divided by, as (constant, slope over the
    training times from 0 to 1): networks meet noisier states as they sample than in training.
    ``options`` are solver settings found in a config, ``config`` the config itself (``for_solver`` reads it).
    Raises LdmfastError for a value outside its set.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    sigma_spacing: str = "default"
    interpolation_type: str = "linear"
    final_sigmas_type: str = "zero"
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: str = "discrete"
    lambda_min_clipped: float = -math.inf
    flow: bool = False
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: str = "exponential"
    shift_terminal: float | None = None
    invert_sigmas: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    epsilon_scale: tuple[float, float] = (1.0, 0.0)
    solver: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    config: Mapping[str, Any] | None = field(default=None, hash=False, repr=False)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise LdmfastError(f"schedule: {name}={value!r} is not known; use one of "
                                   f"{', '.join(choices)}")
        if self.num_train_timesteps < 1:
            raise LdmfastError(f"schedule: num_train_timesteps={self.num_train_timesteps}, must be at "
                               "least 1")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise LdmfastError(f"schedule: trained_betas has {len(self.trained_betas)} values, "
                               f"num_train_timesteps is {self.num_train_timesteps}; they must be equal")
        if not self.shift > 0:
            raise LdmfastError(f"schedule: shift={self.shift}, must be positive")
        allowed = ("flow_prediction", "epsilon", "sample") if self.flow else PREDICTIONS[:3]
        if self.prediction_type not in allowed:
            raise LdmfastError(f"schedule: prediction_type={self.prediction_type!r} with flow={self.flow}, "
                               f"needs one of {', '.join(allowed)}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], solver: str | None = None) -> Schedule:
        """The schedule of a diffusers ``scheduler_config.json``, read as diffusers would read it.

        Missing keys take the defaults of the config's class, or, when ``solver`` names another one, of the
        diffusers class of that solver (what ``OtherScheduler.from_config(config)`` does). Raises
        CheckpointError for an unknown class, and for a setting that changes the numbers and is not
        supported.
        """
        from .configs import read_config
        return read_config(config, solver)

    def for_solver(self, solver: str) -> Schedule:
        """This schedule as ``solver`` reads it: the config's missing keys take that solver's defaults."""
        if self.config is None or solver == self.solver:
            return self
        return Schedule.from_config(self.config, solver)

    @cached_property
    def betas(self) -> Array:
        """(num_train_timesteps,) float64 noise variances of the forward process."""
        n, lo, hi = self.num_train_timesteps, self.beta_start, self.beta_end
        betas: Array
        if self.trained_betas is not None:
            betas = np.asarray(self.trained_betas, dtype=np.float64)
        elif self.beta_schedule == "linear":
            betas = np.linspace(lo, hi, n, dtype=np.float64)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(lo**0.5, hi**0.5, n) ** 2
        elif self.beta_schedule == "sigmoid":
            betas = (hi - lo) / (1 + np.exp(-np.linspace(-6, 6, n))) + lo
        else:
            betas = _betas_from_alpha_bar(self.beta_schedule, n)
        return _rescale_zero_snr(betas) if self.rescale_betas_zero_snr else betas

    @cached_property
    def alphas_cumprod(self) -> Array:
        """(num_train_timesteps,) float64 abar; the last is 0 with ``rescale_betas_zero_snr``."""
        return np.asarray(np.cumprod(1.0 - self.betas), dtype=np.float64)

    @cached_property
    def train_sigmas(self) -> Array:
        """(num_train_timesteps,) float64 sqrt((1 - abar) / abar), rising; finite at zero terminal SNR too."""
        abar = self.alphas_cumprod.copy()
        if self.rescale_betas_zero_snr:
            abar[-1] = ZERO_SNR_FLOOR
        return np.sqrt((1 - abar) / abar)

    @property
    def final_alpha_cumprod(self) -> float:
        """abar where the last step of DDIM and PNDM ends."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    def mu(self, image_seq_len: int) -> float:
        """The resolution-dependent shift of Esser et al. 2024, linear in the number of latent patches."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return self.base_shift + slope * (image_seq_len - self.base_image_seq_len)

    def with_mu(self, mu: float) -> Schedule:
        """This schedule with its dynamic shift fixed.

        mu / (mu + 1/t - 1) is the static shift formula with shift = mu, and the exponential form with
        shift = exp(mu), so a dynamic shift is only another number.
        """
        shift = math.exp(mu) if self.time_shift_type == "exponential" else mu
        return replace(self, shift=shift)


def _betas_from_alpha_bar(kind: str, n: int, max_beta: float = 0.999) -> Array:
    """Betas of a given abar(t), t in [0, 1]: cosine (Nichol & Dhariwal 2021, eq. 17), laplace, exp."""
    def alpha_bar(t: float) -> float:
        if kind == "squaredcos_cap_v2":
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        if kind == "exp":
            return math.exp(-12.0 * t)
        log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
        return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))

    values = [alpha_bar(i / n) for i in range(n + 1)]
    return np.array([min(1 - values[i + 1] / values[i], max_beta) for i in range(n)])


def _rescale_zero_snr(betas: Array) -> Array:
    """Betas whose last abar is 0 and whose first is unchanged (Lin et al. 2024, algorithm 1)."""
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1 - np.concatenate([abar[:1], abar[1:] / abar[:-1]])
