"""A Gaussian mixture whose denoiser is known exactly, in float64: the oracle for orders and laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from ldmfast.samplers import StepTable

MEANS = np.array([[-1.5, 0.0], [1.0, 1.2], [0.8, -1.0]])
WEIGHTS = np.array([0.5, 0.3, 0.2])
DEVIATION = 0.35


def denoised(x: np.ndarray, sigma: float) -> np.ndarray:
    """E[x0 | x0 + sigma * noise = x]: a mean over components of each component's linear shrinkage."""
    variance = DEVIATION**2 + sigma**2
    away = x[:, None, :] - MEANS
    logits = np.log(WEIGHTS) - (away**2).sum(-1) / (2 * variance)
    share = np.exp(logits - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    return (share[:, :, None] * (MEANS + DEVIATION**2 / variance * away)).sum(1)


def stage_level(table: StepTable, i: int) -> tuple[float, float]:
    """(alpha, sigma) of the state at a stage: from c_in in sigma space, else from the step's noise level."""
    if table.c_in[i] != 1:
        return 1.0, math.sqrt(1 / table.c_in[i] ** 2 - 1)
    alpha, sigma = table.noise_levels[table.step_index[i]]
    return float(alpha), float(sigma)


def epsilon(table: StepTable):
    """The exact noise prediction as a denoiser for a table: it sees c_in * x, as a network would."""
    def predict(x_in: Tensor, t: float, i: int) -> Tensor:
        alpha, sigma = stage_level(table, i)
        x = x_in.numpy() / table.c_in[i]
        return torch.from_numpy((x - alpha * denoised(x / alpha, sigma / alpha)) / sigma)
    return predict


def solve(x: np.ndarray, sigma_max: float, sigma_min: float, steps: int = 500) -> np.ndarray:
    """dx/dsigma = (x - D(x, sigma)) / sigma by classical Runge-Kutta in log sigma: the reference."""
    def slope(x: np.ndarray, u: float) -> np.ndarray:
        return x - denoised(x, math.exp(u))
    grid = np.linspace(math.log(sigma_max), math.log(sigma_min), steps + 1)
    for u, v in itertools.pairwise(grid):
        h = v - u
        k1 = slope(x, u)
        k2 = slope(x + h / 2 * k1, u + h / 2)
        k3 = slope(x + h / 2 * k2, u + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3, v))
    return x


def draw(count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, generator=g, dtype=torch.float64)
