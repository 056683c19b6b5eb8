"""Between a network's prediction, the picture and the noise that it stands for: x = alpha * picture + sigma * noise."""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import LdmfastError


def noise_of(e: Tensor, x: Tensor, alpha: float, sigma: float, prediction: str) -> Tensor:
    """The noise that a prediction says to be in x, as the network is shown it."""
    if prediction == "epsilon":
        return e
    if prediction == "v_prediction":
        s = math.hypot(alpha, sigma)
        return alpha / s * e + sigma / s**2 * x
    if prediction == "sample":
        return (x - alpha * e) / sigma
    return x + alpha * e


def picture_of(e: Tensor, x: Tensor, alpha: float, sigma: float, prediction: str) -> Tensor:
    """The picture that a prediction says to be behind x. Raises LdmfastError at pure noise, where an epsilon says
    nothing about it."""
    if prediction == "epsilon":
        if alpha == 0:
            raise LdmfastError("epsilon prediction says nothing about the picture at zero terminal SNR; give the "
                               "guidance a start behind it")
        return (x - sigma * e) / alpha
    if prediction == "v_prediction":
        s = math.hypot(alpha, sigma)
        return alpha / s**2 * x - sigma / s * e
    return e if prediction == "sample" else x - sigma * e


def not_pure_noise(alpha: float) -> float:
    """alpha, to divide by. Raises LdmfastError at pure noise, where flow schedules and zero terminal SNR start."""
    if alpha == 0:
        raise LdmfastError("at pure noise, this model's first step, no finite push moves the picture; give the "
                           "guidance a start behind that step, such as start=0.1 for 10 steps or more")
    return alpha


def moved(e: Tensor, noise: Tensor, alpha: float, sigma: float, prediction: str) -> Tensor:
    """The prediction whose noise is greater by ``noise``, at the same x. Raises LdmfastError at pure noise, unless it
    is an epsilon."""
    if prediction == "epsilon":
        return e + noise
    alpha = not_pure_noise(alpha)
    if prediction == "sample":
        return e - sigma / alpha * noise
    if prediction == "v_prediction":
        return e + math.hypot(alpha, sigma) / alpha * noise
    return e + noise / alpha
