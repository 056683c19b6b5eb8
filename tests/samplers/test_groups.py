"""Joint denoising of two groups, and stages on what the one before drew: exact scores of a Gaussian mixture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mixture import DEVIATION, MEANS, WEIGHTS, denoised, draw, stage_level
from test_exact_score import mixture_law

from ldmfast.errors import LdmfastError, ShapeError
from ldmfast.samplers import Schedule, make_table, representation_guidance, sample, sample_stages

# joint_score() sees (x, z) as the two coordinates of the mixture
TABLE = make_table(Schedule(), "ddim", 200)


def log_density(points: torch.Tensor, alpha: float, sigma: float, columns: slice) -> torch.Tensor:
    """Of the noised mixture's given coordinates, differentiable."""
    means, variance = torch.from_numpy(MEANS)[:, columns] * alpha, (alpha * DEVIATION) ** 2 + sigma**2
    away = ((points[:, None, columns] - means) ** 2).sum(-1) / (2 * variance)
    terms = torch.from_numpy(np.log(WEIGHTS)) - away - math.log(2 * math.pi * variance) * means.shape[1] / 2
    return terms.logsumexp(1)


def score(points: torch.Tensor, alpha: float, sigma: float, columns: slice) -> torch.Tensor:
    with torch.enable_grad():
        leaf = points.clone().requires_grad_()
        return torch.autograd.grad(log_density(leaf, alpha, sigma, columns).sum(), leaf)[0]


EMPTY = 1e4  # a number that no feature has: rows with it see x alone


def joint(x: torch.Tensor, t: float, stage: int) -> torch.Tensor:
    """Noise prediction of a network trained with and without the features."""
    alpha, sigma = stage_level(TABLE, stage)
    alone = (x[:, 1] == EMPTY)[:, None]
    return -sigma * torch.where(alone, score(x, alpha, sigma, slice(0, 1)), score(x, alpha, sigma, slice(0, 2)))


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_representation_guidance_is_the_score_it_claims(weight: float) -> None:
    """grad log p(x) + w grad log p(z | x) for x, the joint score for z, from densities differentiated in float64."""
    x, stage = 2 * draw(64, 5), 60
    alpha, sigma = stage_level(TABLE, stage)
    without, with_ = representation_guidance(joint, 1, EMPTY)(x, 0.0, stage)
    found = without + weight * (with_ - without)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        both, own = (log_density(leaf, alpha, sigma, slice(0, n)) for n in (2, 1))
        wanted, = torch.autograd.grad((own + weight * (both - own)).sum(), leaf)
        full, = torch.autograd.grad(log_density(leaf, alpha, sigma, slice(0, 2)).sum(), leaf)
    assert torch.allclose(found[:, 0], -sigma * wanted[:, 0], rtol=1e-9, atol=1e-10)
    assert torch.allclose(found[:, 1], -sigma * full[:, 1], rtol=1e-9, atol=1e-10)


def test_both_groups_are_drawn_together() -> None:
    """At weight 1 the pair has the joint law, which says which x goes with which z."""
    pair = representation_guidance(joint, 1, EMPTY)
    y = sample(pair, draw(2000, 6), table=TABLE.with_guidance([1.0 + 1e-12] * TABLE.num_stages))
    mixture_law(y.numpy(), DEVIATION)


def test_groups_that_do_not_interact_are_two_runs() -> None:
    def apart(columns: slice):
        def predict(x: torch.Tensor, t: float, stage: int) -> torch.Tensor:
            alpha, sigma = stage_level(TABLE, stage)
            full = torch.zeros(len(x), 2, dtype=x.dtype)
            full[:, columns] = x if x.shape[1] == 1 else x[:, columns]
            return -sigma * score(full, alpha, sigma, columns)[:, columns]
        return predict

    first, second, x = apart(slice(0, 1)), apart(slice(1, 2)), draw(50, 7)

    def both(x: torch.Tensor, t: float, stage: int) -> torch.Tensor:
        return torch.cat([first(x, t, stage), second(x, t, stage)], dim=1)

    once = sample(representation_guidance(both, 1), x, table=TABLE.with_guidance(3.0))
    alone = torch.cat([sample(f, x[:, i:i + 1], table=TABLE) for i, f in enumerate((first, second))], dim=1)
    assert torch.allclose(once, alone, rtol=1e-10, atol=1e-10)


TAU = 0.2  # what the embedding forgets of the first coordinate; of the second it keeps nothing


def conditional(condition: torch.Tensor | None):
    """Noise prediction for p(x | c), c = x[0] + TAU * noise: a mixture again, of other means and variances."""
    shrink = DEVIATION**2 / (DEVIATION**2 + TAU**2)

    def predict(x: torch.Tensor, t: float, stage: int) -> torch.Tensor:
        alpha, sigma = stage_level(TABLE, stage)
        if condition is None:
            y = x.numpy()
            return torch.from_numpy((y - alpha * denoised(y / alpha, sigma / alpha)) / sigma)
        c, means = condition.double(), torch.from_numpy(MEANS)
        logits = torch.from_numpy(np.log(WEIGHTS)) - (c - means[:, 0]) ** 2 / (2 * (DEVIATION**2 + TAU**2))
        moved = means.expand(len(c), -1, -1).clone()
        moved[:, :, 0] += shrink * (c - means[:, 0])
        own = torch.tensor([DEVIATION**2 * (1 - shrink), DEVIATION**2], dtype=torch.float64)
        variance = alpha**2 * own + sigma**2
        away = x[:, None] - alpha * moved
        share = (logits - (away**2 / (2 * variance)).sum(-1)).softmax(1)
        return sigma * (share[..., None] * away / variance).sum(1)
    return predict


def test_stages_keep_the_law_and_the_prior() -> None:
    """Stages that sample p(x | what the one before told) leave the law as it is, and agree with what they were told
    as well as a draw of the pair does: E (x[0] - c)^2 = TAU^2."""
    count, told = 3000, []

    def embed(x: torch.Tensor) -> torch.Tensor:
        told.append(x[:, :1] + TAU * draw(count, 11 + len(told))[:, :1])
        return told[-1]

    noises = [draw(count, seed) for seed in (8, 9, 10)]
    y = sample_stages([conditional] * 3, noises, embed, TABLE)
    assert len(told) == 2
    mixture_law(y.numpy(), DEVIATION)
    error = float(((y[:, :1] - told[-1]) ** 2).mean())
    assert abs(error / TAU**2 - 1) < 5 * math.sqrt(2 / count)
    mixture_law(sample_stages([conditional], noises[:1], embed, [TABLE]).numpy(), DEVIATION)


def test_refuses() -> None:
    with pytest.raises(ShapeError, match="2 channels, of which 2"):
        representation_guidance(joint, 2)(draw(3, 0), 0.0, 0)
    with pytest.raises(LdmfastError, match="2 stages, 1 noises and 2 tables"):
        sample_stages([conditional] * 2, [draw(3, 0)], lambda x: x, TABLE)
