"""Gradients, autoguidance, minorities and compositions, on laws whose scores are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from guidance_oracles import Mixture, rows_of

import ldmfast
from ldmfast.guidance import (
    CFG,
    COND,
    AutoGuidance,
    Call,
    Classifier,
    Compose,
    Energy,
    Minority,
    Plan,
    mixture,
    product,
    united,
)
from ldmfast.guidance.guide import At
from ldmfast.guidance.levels import moved, noise_of, picture_of
from ldmfast.samplers import Schedule, make_table, sample

PROMPTS = ["a red circle above a blue square", "two green triangles"]
CALL: dict[str, Any] = {"num_inference_steps": 5, "generator": 4, "progress": False, "output_type": "latent"}
SCHEDULE = Schedule()
TABLE = make_table(SCHEDULE, "dpmpp_2m", 100)
STEPS = Call.of(SCHEDULE, TABLE)
MEANS = [[-1.5, 0.0], [1.0, 1.2], [0.8, -1.0]]
EVERYTHING = Mixture(MEANS, [0.5, 0.3, 0.2], 0.35)
LABELLED = Mixture(MEANS[1:], [0.3, 0.2], 0.35)


def exact(law: Mixture) -> Any:
    return lambda x, t, i: law.epsilon(x, *STEPS.levels[i])


def draw(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_conversions_agree_with_each_other() -> None:
    picture, noise = draw(5, 0), draw(5, 1)
    for alpha, sigma in ((0.8, 0.6), (0.28, 0.96)):
        kinds = {"epsilon": noise, "sample": picture, "v_prediction": alpha * noise - sigma * picture}
        x = alpha * picture + sigma * noise
        for kind, e in kinds.items():
            torch.testing.assert_close(noise_of(e, x, alpha, sigma, kind), noise)
            torch.testing.assert_close(picture_of(e, x, alpha, sigma, kind), picture)
            torch.testing.assert_close(noise_of(moved(e, picture, alpha, sigma, kind), x, alpha, sigma, kind),
                                       noise + picture)
    x = 0.3 * picture + 0.7 * noise
    e = noise - picture
    torch.testing.assert_close(noise_of(e, x, 0.3, 0.7, "flow_prediction"), noise)
    torch.testing.assert_close(picture_of(e, x, 0.3, 0.7, "flow_prediction"), picture)
    e = moved(e, picture, 0.3, 0.7, "flow_prediction")
    torch.testing.assert_close(noise_of(e, x, 0.3, 0.7, "flow_prediction"), noise + picture)


def test_an_exact_classifier_makes_the_exact_conditional_score_and_law() -> None:
    by_time = {float(t): tuple(level) for t, level in zip(TABLE.network_times, STEPS.levels)}

    def log_prob(x: torch.Tensor, t: float) -> torch.Tensor:
        return LABELLED.log_density(x, *by_time[t]) - EVERYTHING.log_density(x, *by_time[t])

    plan = Plan.of([Classifier(log_prob=log_prob)], STEPS)
    denoise, noise = plan.denoise({"cond": exact(EVERYTHING)}), draw(2000, 2)
    for stage in (0, 50, 99):
        found = denoise(noise, float(TABLE.network_times[stage]), stage)
        torch.testing.assert_close(found, LABELLED.epsilon(noise, *STEPS.levels[stage]), rtol=0, atol=1e-12)
    drawn = sample(denoise, TABLE.add_noise(LABELLED.draw(2000, 3), noise), table=plan.table())
    for axis in range(2):
        a, b = (np.sort(v[:, axis].numpy()) for v in (drawn, LABELLED.draw(20_000, 4)))
        grid = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, grid) / len(a) - np.searchsorted(b, grid) / len(b)).max()
        assert gap < 1.63 * np.sqrt(1 / len(a) + 1 / len(b))


def test_energy_moves_the_estimate_by_its_gradient() -> None:
    """score' = score - w grad E(picture) / alpha: of the picture seen behind x, -(sigma / alpha)^2 w grad E."""
    plan = Plan.of([Energy(energy=lambda p: ((p - 2.0) ** 2).sum(1), scale=0.3, stop=0.6)], STEPS)
    denoise, x = plan.denoise({"cond": exact(EVERYTHING)}), draw(20, 5)
    for stage in (5, 50, 80):
        alpha, sigma = STEPS.levels[stage]
        before = picture_of(EVERYTHING.epsilon(x, alpha, sigma), x, alpha, sigma, "epsilon")
        after = picture_of(denoise(x, 0.0, stage), x, alpha, sigma, "epsilon")
        expected = before - (stage < 60) * 0.3 * (sigma / alpha) ** 2 * 2 * (before - 2.0)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-9)


def test_energy_in_a_pipeline(tiny) -> None:
    """The energy is of the picture: it falls, for every prediction that is its own batch row, with and without CFG."""
    def energy(picture: torch.Tensor) -> torch.Tensor:
        return (picture[:, 0] - 1.0).square().flatten(1).mean(1)

    pipe = tiny["exact"]
    plain = pipe(PROMPTS, **CALL | {"generator": [4, 5]}).images
    guidance = Energy(energy=energy, scale=30.0, start=0.2)
    out = pipe(PROMPTS, **CALL | {"generator": [4, 5]}, guidance=guidance)
    assert bool((energy(out.images) < 0.9 * energy(plain)).all())
    alone = pipe(PROMPTS[1], **CALL | {"generator": [5]}, guidance=guidance).images
    torch.testing.assert_close(out.images[1:], alone, rtol=0, atol=1e-5)
    assert out.settings[0]["guidance"][0]["energy"] == "energy" and not out.settings[0]["repeatable"]
    wrong = {"one number a picture": lambda p: p.sum(), "no gradient": lambda p: p.detach().sum((1, 2, 3))}
    for words, bad in wrong.items():
        with pytest.raises(ldmfast.LdmfastError, match=words):
            pipe(PROMPTS[0], **CALL, guidance=Energy(energy=bad))


@pytest.mark.parametrize("guidance", [
    lambda start: Energy(energy=lambda p: p.square().sum((1, 2, 3)), start=start),
    lambda start: Classifier(log_prob=lambda x, t: -x.square().sum((1, 2, 3)), start=start),
    lambda start: Minority(scale=0.1, start=start)])
def test_pushes_of_a_flow_start_behind_pure_noise(guidance) -> None:
    """They divided by an alpha of zero, in Python."""
    pipe = ldmfast.Pipeline.tiny("dit")
    call = {"num_inference_steps": 3, "output_type": "latent", "progress": False, "generator": 0}
    with pytest.raises(ldmfast.LdmfastError, match="at pure noise"):
        pipe(PROMPTS[0], guidance=guidance(0.0), **call)
    assert not torch.equal(pipe(PROMPTS[0], guidance=guidance(0.4), **call).images, pipe(PROMPTS[0], **call).images)


def test_minorities_are_rarer() -> None:
    """Mean log-density of what is drawn falls; the exact denoiser stands in for the network at both levels."""
    law = Mixture([[-1.5, 0.0], [1.5, 0.0]], [0.95, 0.05], 0.4)

    def drawn(scale: float) -> torch.Tensor:
        guidance = Minority(scale=scale, time=500.0, start=0.1, stop=0.9)
        plan = Plan.of([guidance] if scale else [], STEPS)
        level = STEPS.level(500.0)

        def denoise(x: torch.Tensor, t: float, i: int) -> Any:
            outs = {COND: law.epsilon(x, *STEPS.levels[i])}
            for branch in plan.active(i):
                if branch.source is not None:
                    shown = branch.source.shown(x, outs[COND], None, At(i, STEPS, x, {}))
                    assert branch.source.time(t) == 500.0
                    outs[branch] = law.epsilon(shown, *level)
            return plan.outputs(outs, i, x, {})

        return sample(denoise, TABLE.add_noise(law.draw(3000, 8), draw(3000, 7)), table=plan.table())

    plain, pushed = drawn(0.0), drawn(0.1)
    densities = [float(law.log_density(y, 1.0, 1e-6).mean()) for y in (plain, pushed)]
    shares = [float((y[:, 0] > 0).double().mean()) for y in (plain, pushed)]
    assert densities[1] < densities[0] - 0.1 and shares[1] > 1.1 * shares[0], (densities, shares)


def test_minority_and_autoguidance_in_a_pipeline(tiny) -> None:
    pipe = tiny["exact"]
    for guidance in (Minority(scale=0.05, every=2), AutoGuidance(weak=tiny["bf16"], scale=2.0)):
        both = pipe(PROMPTS, **CALL | {"generator": [4, 5]}, guidance=guidance).images
        alone = pipe(PROMPTS[1], **CALL | {"generator": [5]}, guidance=guidance).images
        assert torch.equal(both[1:], alone)
    with rows_of(pipe.unet) as seen:
        pipe(PROMPTS[0], **CALL, guidance=Minority(every=2))
    assert seen == [2, 1, 2, 2, 1, 2, 2, 1]


def test_autoguidance_is_its_formula(tiny) -> None:
    """By itself it is the good network; the same network as weak one changes nothing; no unconditional branch."""
    pipe = tiny["exact"]
    cond = pipe(PROMPTS[0], **CALL, guidance_scale=1.0).images
    with rows_of(pipe.unet) as seen:
        same = pipe(PROMPTS[0], **CALL, guidance=AutoGuidance(weak=pipe, scale=3.0)).images
    assert seen == [1] * 10
    torch.testing.assert_close(same, cond, rtol=0, atol=1e-4)
    assert torch.equal(pipe(PROMPTS[0], **CALL, guidance=AutoGuidance(weak=tiny["bf16"], scale=1.0)).images, cond)
    away = pipe(PROMPTS[0], **CALL, guidance=AutoGuidance(weak=tiny["bf16"], scale=3.0))
    assert (away.images - cond).abs().max() > 1e-3 and not away.settings[0]["repeatable"]
    with pytest.raises(ldmfast.LdmfastError, match="they must agree"):
        pipe(PROMPTS[0], **CALL, guidance=AutoGuidance(weak=ldmfast.Pipeline.tiny("dit").unet))
    with pytest.raises(ldmfast.LdmfastError, match="neither a Pipeline"):
        AutoGuidance(weak="early")


def test_composition_of_prompts(tiny) -> None:
    """The call's own prompt as the second one is classifier-free guidance of both scales; scale 0 adds nothing; a
    negated prompt in both places cancels; a batch is its pictures."""
    pipe = tiny["exact"]
    cfg = pipe(PROMPTS[0], **CALL, guidance_scale=4.0).images
    with rows_of(pipe.unet) as seen:
        own = Compose(prompts=[PROMPTS[0]], scales=[2.5])
        twice = pipe(PROMPTS[0], **CALL, guidance_scale=1.5, guidance=own).images
    assert seen == [3] * 5
    torch.testing.assert_close(twice, cfg, rtol=0, atol=1e-4)
    given = Compose(prompts=PROMPTS, scales=[1.0, 3.0])
    both = pipe(PROMPTS, **CALL | {"generator": [4, 5]}, guidance=given)
    alone = pipe(PROMPTS[1], **CALL | {"generator": [5]}, guidance=given)
    assert torch.equal(both.images[1:], alone.images)
    again = pipe.repeat(pipe(PROMPTS, **CALL | {"output_type": "pil"}, guidance=given).settings[1], progress=False)
    assert again.settings[0]["guidance"] == both.settings[0]["guidance"]
    with pytest.raises(ldmfast.LdmfastError, match="not prompt_embeds"):
        pipe(prompt_embeds=torch.zeros(1, 8, 8), **CALL, guidance=given)


def test_composed_exact_scores_are_the_products() -> None:
    """uncond + sum_k w_k (cond_k - uncond) is the score of p(x) prod_k (p_k(x) / p(x))^w_k at that noise level."""
    first, second = Mixture(MEANS[:2], [0.5, 0.3], 0.35), LABELLED
    plan = Plan.of([CFG(scale=2.0), Compose(prompts=["second"], scales=[-1.5])], STEPS)
    denoise = plan.denoise({"cond": exact(first), "uncond": exact(EVERYTHING), "second": exact(second)})
    x = draw(50, 9)
    for stage in (10, 60):
        alpha, sigma = STEPS.levels[stage]
        with torch.enable_grad():
            at = x.clone().requires_grad_()
            p, q, r = (law.log_density(at, alpha, sigma) for law in (EVERYTHING, first, second))
            gradient, = torch.autograd.grad((p + 2.0 * (q - p) - 1.5 * (r - p)).sum(), at)
        found = sum(w * o for w, o in zip(plan.weights[stage], denoise(x, 0.0, stage)))
        torch.testing.assert_close(found, -sigma * gradient, rtol=0, atol=1e-10)


def test_compartments_pool_to_the_whole() -> None:
    """Posterior weights make of two exact denoisers that of the pooled mixture; a forgotten one is gone."""
    left, weights = Mixture(MEANS[:1], [1.0], 0.35), torch.tensor([0.5, 0.5], dtype=torch.float64)
    laws = [left, LABELLED]

    def log_weights(x: torch.Tensor, t: float, i: int) -> torch.Tensor:
        return torch.stack([law.log_density(x, *STEPS.levels[i]) + w.log() for law, w in zip(laws, weights)])

    pooled = mixture([exact(law) for law in laws], log_weights)
    x = draw(200, 10)
    for stage in (0, 40, 95):
        expected = EVERYTHING.epsilon(x, *STEPS.levels[stage])
        torch.testing.assert_close(pooled(x, 0.0, stage), expected, rtol=0, atol=2e-14)
    alone = mixture([exact(LABELLED)], lambda x, t, i: log_weights(x, t, i)[1:])
    assert torch.equal(alone(x, 0.0, 40), LABELLED.epsilon(x, *STEPS.levels[40]))
    with pytest.raises(ldmfast.LdmfastError, match="models"):
        mixture([exact(left)], log_weights)(x, 0.0, 0)


def test_fused_gaussians_are_their_product() -> None:
    """Against the density itself: log N1^a + log N2^b has this mean as its peak and this variance as its curvature."""
    means = [torch.tensor([0.3, -1.0]).double(), torch.tensor([2.0, 1.0]).double()]
    variances, a = [0.5, 2.0], [0.7, 1.8]
    mean, variance = product(means, variances, a)
    with torch.enable_grad():
        at = mean.clone().requires_grad_()
        log = sum(-r * (at - m).square().sum() / (2 * v) for m, v, r in zip(means, variances, a))
        slope, = torch.autograd.grad(log, at, create_graph=True)
        curvature, = torch.autograd.grad(slope.sum(), at)
    torch.testing.assert_close(slope.detach(), torch.zeros(2).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(variance.expand(2), -1 / curvature)
    one, two = exact(LABELLED), exact(EVERYTHING)
    x = draw(20, 11)
    assert torch.equal(united([one, two], [1.0, 0.0])(x, 0.0, 30), one(x, 0.0, 30))
    fused = product([one(x, 0.0, 30), two(x, 0.0, 30)], [0.1, 0.1], [1.0, 3.0])[0]
    torch.testing.assert_close(united([one, two], [1.0, 3.0])(x, 0.0, 30), fused)
    for bad in (lambda: product(means, [1.0]), lambda: product(means, variances, [1.0, -9.0]),
                lambda: united([one], [0.0]), lambda: united([one, two], [1.0])):
        with pytest.raises(ldmfast.LdmfastError):
            bad()
