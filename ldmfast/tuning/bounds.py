"""Lower bounds from a few held-out pictures: for a mean, for a share, and for one more picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from ..errors import LdmfastError


def mean_bound(values: Sequence[float], confidence: float = 0.95, new: int | None = None) -> float:
    """One-sided lower bound for the mean of what ``values`` were drawn from, or for the mean of ``new`` more of them.

    mean - t s sqrt(1/n + 1/new), with t the ``confidence`` quantile of Student's law with n - 1 degrees of freedom
    (Student 1908; with 1/new: Hahn & Meeker 1991, "Statistical Intervals", section 4.7, the prediction bound for the
    mean of future observations). Exact for normal values, and close for means of others. Values beyond 100 (PSNR of
    equal pictures is infinite) count as 100, which only lowers the bound. Raises LdmfastError for fewer than two.
    """
    n = len(values)
    if n < 2:
        raise LdmfastError(f"a bound for the mean needs at least 2 values, {n} given")
    capped = [min(v, 100.0) for v in values]
    mean = math.fsum(capped) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in capped) / (n - 1))
    return mean - student_quantile(confidence, n - 1) * spread * math.sqrt(1 / n + (1 / new if new else 0.0))


@cache
def share_bound(good: int, n: int, confidence: float = 0.95) -> float:
    """One-sided lower bound for a probability of which ``good`` in ``n`` draws came true: the p at which that many or
    more have probability 1 - confidence (Clopper & Pearson 1934). It supposes nothing of what is measured."""
    if not 0 <= good <= n or n == 0:
        raise LdmfastError(f"good={good} of n={n} draws: needs 0 <= good <= n and n > 0")
    return 0.0 if good == 0 else _inverse(lambda p: beta(good, n - good + 1, p), 1 - confidence)


def one_bound(values: Sequence[float], confidence: float = 0.95) -> float:
    """Lower bound for one more value drawn like these: the k-th smallest, k = floor((1 - confidence)(n + 1)), minus
    infinity where that is none (split conformal prediction: Lei et al. 2018, "Distribution-Free Predictive Inference
    for Regression", theorem 2). It supposes only that the order of drawing does not matter."""
    k = math.floor((1 - confidence) * (len(values) + 1) + 1e-9)
    return sorted(values)[k - 1] if k > 0 else -math.inf


@cache
def student_quantile(confidence: float, freedom: int) -> float:
    """The t that Student's law with ``freedom`` degrees stays below with probability ``confidence``, 0.5 to 1."""
    if not 0.5 <= confidence < 1:
        raise LdmfastError(f"confidence={confidence!r} is not between 0.5 and 1")
    # P(T <= t) = 1 - I_x(freedom / 2, 1 / 2) / 2 with x = freedom / (freedom + t^2)
    x = _inverse(lambda x: beta(freedom / 2, 0.5, x), 2 * (1 - confidence))
    return math.sqrt(freedom * (1 - x) / x)


def beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Abramowitz & Stegun 26.5.8),
    evaluated as Lentz does."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    value, c, d = 1.0, 1.0, 0.0
    for i in range(500):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / ((1 + term * d) or 1e-300)
        c = (1 + term / c) or 1e-300
        value *= c * d
        if abs(1 - c * d) < 1e-14:
            break
    return front * (value - 1)


def _inverse(function: Callable[[float], float], target: float) -> float:
    """The x in (0, 1) where a rising function is ``target``."""
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return middle
