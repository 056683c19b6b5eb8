"""PSNR, SSIM, trajectories and bounds against what others compute, by hand, and by simulation."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import special, stats

import ldmfast
from ldmfast.samplers import Schedule, make_table, sample
from ldmfast.tuning import mean_bound, one_bound, psnr, share_bound, ssim
from ldmfast.tuning.bounds import beta, student_quantile
from ldmfast.tuning.metrics import Trajectory, latent_errors


def pictures(seed: int, n: int = 2, height: int = 24, width: int = 16) -> torch.Tensor:
    return torch.rand((n, 3, height, width), generator=torch.Generator().manual_seed(seed))


def test_psnr_of_an_error_of_known_size():
    x = pictures(0) * 0.5
    found = psnr(torch.stack([x[0] + 0.1, x[1]]), x)
    assert found[0].item() == pytest.approx(20, abs=1e-5) and math.isinf(found[1].item())
    assert psnr(x + torch.tensor([0.1, -0.001]).view(2, 1, 1, 1), x)[1].item() == pytest.approx(60, abs=1e-3)
    with pytest.raises(ldmfast.errors.ShapeError):
        psnr(x, x[:1])


def ssim_by_windows(x: np.ndarray, y: np.ndarray) -> float:
    """Wang et al. 2004 as it is written, window by window, in float64."""
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    w = np.outer(line, line) / line.sum() ** 2
    found = []
    for c in range(len(x)):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                a, b = (z[c, i:i + 11, j:j + 11] for z in (x, y))
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
                cov = (w * (a - ma) * (b - mb)).sum()
                found.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return float(np.mean(found))


def test_ssim_is_that_of_the_paper():
    x, noise = pictures(1), pictures(2)
    y = (0.8 * x + 0.2 * noise)
    found = ssim(y, x)
    expected = [ssim_by_windows(a.double().numpy(), b.double().numpy()) for a, b in zip(y, x)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12) and max(expected) < 0.99
    assert ssim(x, x).tolist() == [1.0, 1.0]
    try:
        from skimage.metrics import structural_similarity
    except ImportError:  # the direct oracle above stands in
        return
    theirs = structural_similarity(x[0].double().numpy(), y[0].double().numpy(), channel_axis=0, data_range=1.0,
                                   gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert found[0].item() == pytest.approx(theirs, abs=2e-3)  # theirs pads borders before cropping


def test_a_planted_error_of_the_latents_is_reported_level_by_level():
    levels = np.array([[0.2, 0.98], [0.6, 0.8], [1.0, 0.0]])
    x = [torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    planted = [0.5, 0.25, 0.125]
    off = [z + p * z.flatten(1).norm(dim=1).view(2, 1, 1, 1) * torch.ones_like(z) / 6 for z, p in zip(x, planted)]
    noise, rows = latent_errors(Trajectory(off, levels), Trajectory(x, levels))  # ones (4, 3, 3) / 6 has norm 1
    assert noise == pytest.approx([0.98 / 1.18, 0.8 / 1.4, 0.0])
    assert rows.tolist() == [pytest.approx([p, p], rel=1e-6) for p in planted]


@pytest.mark.parametrize("flow", [False, True])
def test_between_steps_the_reference_is_on_its_solvers_path(flow: bool):
    """A network whose prediction does not depend on x: every DDIM or Euler run lies on one path, so runs of 5 and of 7
    steps differ by rounding alone."""
    schedule = (Schedule(flow=True, prediction_type="flow_prediction") if flow else
                Schedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
    solver = "flow_euler" if flow else "ddim"
    start = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    constant = torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(times: list[float]) -> Trajectory:
        given = {"sigmas": times} if flow else {"timesteps": times}
        table, found = make_table(schedule, solver, **given), []
        sample(lambda x, t, i: constant, start * table.init_noise_sigma, table=table,
               callback=lambda step, t, x: found.append(x.clone()))
        return Trajectory(found, table.noise_levels[1:])

    times = [0.9, 0.7, 0.5, 0.3, 0.1] if flow else [901, 701, 501, 301, 101]
    coarse, fine = run(times), run(times[:1] + [(a + b) / 2 if flow else (a + b) // 2 for a, b in
                                                pairwise(times)] + times[-1:])
    levels, rows = latent_errors(coarse, fine)
    assert len(levels) >= 4 and rows.max() < 1e-9
    bent = Trajectory([x + 0.01 for x in coarse.latents], np.stack([1 - coarse.noise, coarse.noise], 1))
    assert latent_errors(bent, fine)[1].min() > 1e-4


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_quantiles_are_scipys(confidence: float):
    for freedom in (1, 2, 7, 40):
        assert student_quantile(confidence, freedom) == pytest.approx(stats.t.ppf(confidence, freedom), rel=1e-9)
    for good, n in ((1, 16), (13, 20), (16, 16), (99, 100)):
        assert share_bound(good, n, confidence) == pytest.approx(stats.beta.ppf(1 - confidence, good, n - good + 1))
    assert share_bound(0, 5) == 0
    for a, b, x in ((3, 5, 0.2), (30, 0.5, 0.99), (0.5, 0.5, 0.3)):
        assert beta(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-10)


def test_the_bounds_cover():
    """Of 2000 draws at least 95% are covered, but for what chance leaves: three standard deviations, 1.5 points."""
    draw, least = np.random.default_rng(0), 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2000)
    normal = draw.normal(33, 4, (2000, 16))
    more = draw.normal(33, 4, (2000, 100)).mean(1)
    assert np.mean([mean_bound(row) <= 33 for row in normal]) >= least
    assert np.mean([mean_bound(row, new=100) <= m for row, m in zip(normal, more)]) >= least
    assert np.mean([mean_bound(row) <= 33 for row in normal]) <= 1 - 0.05 / 2  # nor is it so wide that it says nothing
    skewed = draw.gumbel(30, 4, (2000, 40))
    assert np.mean([one_bound(row[:39]) <= row[39] for row in skewed]) >= least
    counts = draw.binomial(20, 0.8, 2000)
    assert np.mean([share_bound(int(k), 20) <= 0.8 for k in counts]) >= least
    assert one_bound(range(18)) == -math.inf and one_bound(range(19)) == 0
