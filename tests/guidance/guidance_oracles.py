"""Gaussian mixtures whose score is exact at every noise level, and what counts forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Mixture:
    """sum_k weights[k] N(means[k], deviation^2), (K,) and (K, D), float64."""

    def __init__(self, means: Any, weights: Any, deviation: float) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.weights = self.weights / self.weights.sum()
        self.deviation = deviation

    def log_density(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """(N,) of alpha * picture + sigma * noise at x (N, D), up to what does not depend on x and the component."""
        variance = (alpha * self.deviation) ** 2 + sigma**2
        away = x[:, None] - alpha * self.means
        exponent = self.weights.log() - away.square().sum(-1) / (2 * variance)
        return torch.logsumexp(exponent, 1) - x.shape[1] / 2 * torch.log(torch.tensor(variance))

    def epsilon(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """-sigma grad log p(x), by differentiating the density."""
        with torch.enable_grad():
            at = x.detach().clone().requires_grad_()
            gradient, = torch.autograd.grad(self.log_density(at, alpha, sigma).sum(), at)
        return -sigma * gradient

    def draw(self, count: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=g)
        noise = torch.randn(count, self.means.shape[1], generator=g, dtype=torch.float64)
        return self.means[which] + self.deviation * noise


@contextmanager
def rows_of(network: torch.nn.Module) -> Iterator[list[int]]:
    """The batch sizes of the forwards that are made meanwhile."""
    seen: list[int] = []
    handle = network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
