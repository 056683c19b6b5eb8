"""Classifier-free guidance and what stands in its place: formulas, intervals, forwards, and what they live with."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from guidance_oracles import Mixture, rows_of

import ldmfast
from ldmfast.caches import FORA, DeepCache, TeaCache, TGate
from ldmfast.engine import Engine, RecordedGraphs
from ldmfast.guidance import APG, CFG, Call, CFGZero, Plan, SkipLayer, TangentialCFG, from_settings
from ldmfast.samplers import Schedule, make_table, sample

PROMPTS = ["a red circle above a blue square", "two green triangles"]
CALL: dict[str, Any] = {"num_inference_steps": 8, "generator": 4, "progress": False, "output_type": "latent"}
EPSILON = Schedule()
FLOW = Schedule(flow=True, prediction_type="flow_prediction", shift=3.0)


def plan_of(guidance: Any, schedule: Schedule = EPSILON, steps: int = 8, scale: float = 4.0) -> Plan:
    table = make_table(schedule, "flow_euler" if schedule.flow else "ddim", steps)
    return Plan.of([guidance], Call.of(schedule, table, scale))


def predictions(plan: Plan, seed: int = 0) -> list[torch.Tensor]:
    """What the table makes of random predictions at each stage, in float64."""
    g = torch.Generator().manual_seed(seed)
    memory: dict[int, dict[str, Any]] = {}
    found = []
    for stage in range(plan.call.table.num_stages):
        drawn = dict(zip(("cond", "uncond"), torch.randn(2, 3, 4, 5, 5, generator=g, dtype=torch.float64) + 0.3))
        outs = plan.outputs({b: drawn[b.name] for b in plan.active(stage)}, stage, drawn["cond"], memory)
        if isinstance(outs, tuple):
            outs = sum(w * o for w, o in zip(plan.weights[stage], outs) if o is not None)
        found.append(outs)
    return found


PAIRS = {
    "cfg": (CFG(scale=4.0, start=0.2, stop=0.8), diffusers.ClassifierFreeGuidance(4.0, start=0.2, stop=0.8)),
    "rescaled": (CFG(scale=4.0, rescale=0.7), diffusers.ClassifierFreeGuidance(4.0, guidance_rescale=0.7)),
    "apg": (APG(scale=4.0, stop=0.7), diffusers.AdaptiveProjectedGuidance(4.0, stop=0.7)),
    "apg with momentum": (
        APG(scale=6.0, momentum=-0.5, norm_threshold=2.5, eta=0.3, rescale=0.2),
        diffusers.AdaptiveProjectedGuidance(6.0, -0.5, 2.5, eta=0.3, guidance_rescale=0.2)),
    "cfg zero": (CFGZero(scale=4.0, start=0.1), diffusers.ClassifierFreeZeroStarGuidance(4.0, start=0.1)),
    "cfg zero, rescaled": (CFGZero(scale=4.0, zero_init_steps=0, rescale=0.4),
                           diffusers.ClassifierFreeZeroStarGuidance(4.0, 0, guidance_rescale=0.4)),
    "tangential": (TangentialCFG(scale=4.0, stop=0.5), diffusers.TangentialClassifierFreeGuidance(4.0, stop=0.5)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_formulas_are_those_of_diffusers_guiders(name: str, monkeypatch) -> None:
    ours, theirs = PAIRS[name]
    plan = plan_of(ours, FLOW)
    if getattr(theirs, "adaptive_projected_guidance_momentum", None) is not None:
        theirs.momentum_buffer = MomentumBuffer(theirs.adaptive_projected_guidance_momentum)
    g = torch.Generator().manual_seed(0)
    for stage, found in enumerate(predictions(plan)):
        cond, uncond = torch.randn(2, 3, 4, 5, 5, generator=g, dtype=torch.float64) + 0.3
        theirs.set_state(step=stage, num_inference_steps=8, timestep=None)
        with monkeypatch.context() as wide:  # some of theirs go to fp32 on the way
            wide.setattr(torch.Tensor, "float", torch.Tensor.double)
            expected = theirs.forward(cond, uncond).pred
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("solver", ["ddim", "euler", "heun"])
def test_noise_levels_are_those_of_x_whatever_the_network_is_told(solver: str) -> None:
    """Those of the list, also past the trained ones (40); inside a step, those of the solver's own times."""
    sigmas = np.array([40.0, 3.0, 0.5])
    table = make_table(EPSILON, solver, sigmas=[*sigmas, 0.0])
    told = table.with_network_times(table.network_times * 0.7).with_network_times(lambda t: t / 2)
    found = Call.of(EPSILON, told).levels
    first = np.append(True, table.step_end[:-1])
    np.testing.assert_allclose(found[first, 1] / found[first, 0], sigmas, rtol=1e-9)
    np.testing.assert_allclose(np.hypot(*found.T), 1, rtol=1e-9)  # as the network is shown it
    inside = {"heun": sigmas[1:]}.get(solver, [])
    np.testing.assert_allclose((found[:, 1] / found[:, 0])[~first], inside, rtol=1e-3)


def test_a_base_without_a_scale_of_its_own_is_off_where_guidance_is(tiny) -> None:
    off = tiny["exact"](PROMPTS[0], **CALL, guidance_scale=0).images
    for base in (CFG(), APG(), CFG(schedule="cosine")):
        assert torch.equal(tiny["exact"](PROMPTS[0], **CALL, guidance_scale=0, guidance=base).images, off)
    own = tiny["exact"](PROMPTS[0], **CALL, guidance_scale=0, guidance=CFG(scale=0.0)).images
    assert not torch.allclose(own, off, atol=0.1)


def test_guided_exact_scores_follow_bayes() -> None:
    """On a mixture of two labelled ones: uncond + w (cond - uncond) is -sigma (grad log p + w grad log p(y | x)), the
    classifier's gradient taken by itself. At w = 1 that is the conditional law, which is sampled."""
    means = [[-1.5, 0.0], [1.0, 1.2], [0.8, -1.0]]
    everything, labelled = Mixture(means, [0.5, 0.3, 0.2], 0.35), Mixture(means[1:], [0.3, 0.2], 0.35)
    table = make_table(EPSILON, "dpmpp_2m", 200)
    call = Call.of(EPSILON, table)

    def denoiser(w: float) -> Any:
        plan = Plan.of([CFG(scale=w)], call)
        return plan, plan.denoise({
            "uncond": lambda x, t, i: everything.epsilon(x, *call.levels[i]),
            "cond": lambda x, t, i: labelled.epsilon(x, *call.levels[i])})

    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan, denoise = denoiser(3.0)
    for stage in (0, 100, 198):
        alpha, sigma = call.levels[stage]
        with torch.enable_grad():
            at = x.clone().requires_grad_()
            posterior = labelled.log_density(at, alpha, sigma) - everything.log_density(at, alpha, sigma)
            classifier, = torch.autograd.grad(posterior.sum(), at)
        bayes = everything.epsilon(x, alpha, sigma) - 3.0 * sigma * classifier
        outs = denoise(x, table.network_times[stage], stage)
        torch.testing.assert_close(sum(w * o for w, o in zip(plan.weights[stage], outs)), bayes, rtol=0, atol=1e-10)
    plan, denoise = denoiser(1.0)
    drawn = sample(denoise, table.add_noise(labelled.draw(2000, 3), x), table=plan.table())
    expected = labelled.draw(20_000, 2)
    for axis in range(2):  # Kolmogorov-Smirnov: 1.63 / sqrt(n) is the 1% point
        a, b = (np.sort(v[:, axis].numpy()) for v in (drawn, expected))
        grid = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, grid) / len(a) - np.searchsorted(b, grid) / len(b)).max()
        assert gap < 1.63 * np.sqrt(1 / len(a) + 1 / len(b))


@pytest.mark.parametrize("guidance, rows", [
    (CFG(start=0.25, stop=0.75), [1, 1, 2, 2, 2, 2, 1, 1]),
    (APG(scale=3.0, stop=0.5), [2, 2, 2, 2, 1, 1, 1, 1]),
    (CFG(schedule=[1, 3, 0, 1, 2, 2, 1, 1]), [1, 2, 1, 1, 2, 2, 1, 1]),
    (CFG(schedule="cosine"), [1, *[2] * 7]),
], ids=lambda v: str(v)[:30])
def test_outside_an_interval_one_forward_is_spent(tiny, guidance: Any, rows: list[int]) -> None:
    with rows_of(tiny["bf16"].unet) as seen:
        tiny["bf16"](PROMPTS[0], **CALL, guidance_scale=4.0, guidance=guidance)
    assert seen == rows


def test_an_interval_of_noise_levels(tiny) -> None:
    pipe = tiny["bf16"]
    table = make_table(pipe.schedule, pipe.loaded.defaults.get("solver", "dpmpp_2m"), 8)
    abar = pipe.schedule.alphas_cumprod[table.network_times.round().astype(int)]
    ratio = np.sqrt((1 - abar) / abar)
    inside = (ratio >= 0.3) & (ratio <= 3.0)
    assert 0 < inside.sum() < 8
    with rows_of(pipe.unet) as seen:
        pipe(PROMPTS[0], **CALL, guidance=CFG(scale=4.0, sigmas=(0.3, 3.0)))
    assert seen == [2 if i else 1 for i in inside]


def test_a_schedule_is_its_list_of_scales(tiny) -> None:
    """Against a run that evaluates both branches everywhere, by themselves, and folds the same scales."""
    pipe = tiny["exact"]
    scales = [1 + 3.0 * (1 - np.cos(np.pi * i / 7)) / 2 for i in range(8)]
    found = pipe(PROMPTS[0], **CALL, guidance=CFG(scale=4.0, schedule="cosine")).images
    listed = pipe(PROMPTS[0], **CALL, guidance=CFG(schedule=scales)).images
    torch.testing.assert_close(found, listed, rtol=0, atol=1e-5)
    separate = by_hand(pipe, PROMPTS[0], scales)
    torch.testing.assert_close(found, separate, rtol=0, atol=2e-5)


def by_hand(pipe: ldmfast.Pipeline, prompt: str, scales: Any) -> torch.Tensor:
    """The two branches in forwards of their own, in exact precision."""
    from ldmfast.pipelines.text import encode_prompts

    encoded = encode_prompts(pipe.loaded.text_encoders, ["", prompt], one_by_one=True)
    table = make_table(pipe.schedule, pipe.loaded.defaults.get("solver", "dpmpp_2m"), 8).with_guidance(scales)
    times = table.network_times.tolist()

    def branch(i: int) -> Any:
        tokens = None if encoded.tokens is None else int(encoded.tokens[i])
        return pipe.unet.prepare(times, encoded.states[i:i + 1, :tokens])

    states = [branch(0), branch(1)]
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4)) * table.init_noise_sigma
    x = x[:, :pipe.vae.config.latent_channels]
    shape = (1, pipe.vae.config.latent_channels, *[64 // pipe.vae_scale_factor] * 2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)) * table.init_noise_sigma
    return sample(lambda y, t, i: [pipe.unet(y, t, state=s) for s in states], x, table=table)


def test_scale_one_is_the_conditional_prediction(tiny) -> None:
    plain = tiny["exact"](PROMPTS[0], **CALL, guidance_scale=1.0).images
    for guidance in (CFG(scale=1.0), APG(scale=1.0), CFGZero(scale=1.0), CFG(start=0.5, stop=0.5, scale=9.0)):
        assert torch.equal(tiny["exact"](PROMPTS[0], **CALL, guidance=guidance).images, plain)


def test_plain_spelling(tiny) -> None:
    """guidance_scale is CFG(), and the scale of what stands in its place; guidance_rescale goes to either."""
    pipe = tiny["exact"]
    for extra in ({}, {"guidance_rescale": 0.6}):
        plain = pipe(PROMPTS[0], **CALL, guidance_scale=3.0, **extra).images
        rescale = {"rescale": 0.6} if extra else {}
        assert torch.equal(pipe(PROMPTS[0], **CALL, guidance=CFG(scale=3.0, **rescale)).images, plain)
        assert torch.equal(pipe(PROMPTS[0], **CALL, guidance=CFG(), guidance_scale=3.0, **extra).images, plain)
    apg = pipe(PROMPTS[0], **CALL, guidance=APG(), guidance_scale=3.0).images
    assert torch.equal(pipe(PROMPTS[0], **CALL, guidance=APG(scale=3.0), guidance_scale=8.0).images, apg)


@pytest.mark.parametrize("guidance", [APG(momentum=-0.5, stop=0.8), CFG(start=0.2, stop=0.7)], ids=["apg", "interval"])
@pytest.mark.parametrize("cache", [None, DeepCache(interval=2), TeaCache(threshold=1.0), FORA(interval=3)], ids=str)
def test_a_pictures_bits_do_not_depend_on_its_neighbour(tiny, guidance: Any, cache: Any) -> None:
    call = CALL | {"cache": cache, "guidance": guidance}
    both = tiny["exact"](PROMPTS, **call | {"generator": [4, 5]})
    alone = tiny["exact"](PROMPTS[1], **call | {"generator": [5]})
    assert torch.equal(both.images[1:], alone.images)
    assert cache is None or sum(alone.report.reused.values())


def test_a_cache_that_never_reuses_changes_nothing(tiny) -> None:
    for guidance in (APG(stop=0.5), CFG(start=0.2, stop=0.7)):
        plain = tiny["exact"](PROMPTS[0], **CALL, guidance=guidance).images
        for cache in (DeepCache(interval=1), TGate(gate=8)):
            assert torch.equal(tiny["exact"](PROMPTS[0], **CALL, guidance=guidance, cache=cache).images, plain)


@pytest.mark.parametrize("solver", ["heun", "euler_a", "unipc", "dpmpp_3m_sde", "lms"])
def test_solvers_of_several_evaluations_and_of_noise(tiny, solver: str) -> None:
    """An interval of all steps is no interval, whatever a step is made of."""
    call = CALL | {"num_inference_steps": 5, "solver": solver, "guidance_scale": 3.0}
    plain = tiny["exact"](PROMPTS[0], **call).images
    assert torch.equal(tiny["exact"](PROMPTS[0], **call, guidance=CFG(start=0.0, stop=1.0)).images, plain)
    limited = tiny["exact"](PROMPTS[0], **call, guidance=CFG(stop=0.5)).images
    assert torch.isfinite(limited).all() and not torch.equal(limited, plain)


def test_threads_share_no_momentum(tiny) -> None:
    pipe = tiny["bf16"]
    calls = [CALL | {"prompt": PROMPTS[i % 2], "generator": i, "guidance": g} for i, g in enumerate(
        [APG(momentum=-0.7), APG(momentum=-0.7, scale=5.0), CFG(stop=0.5), CFGZero()])]
    expected = [pipe(**c).images for c in calls]
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i, c=c: found.__setitem__(i, pipe(**c).images))
               for i, c in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], e) for i, e in enumerate(expected))


def test_settings_make_the_picture_again(tiny) -> None:
    pipe, guidance = tiny["exact"], APG(momentum=-0.5, schedule=[2.0] * 8, sigmas=(0.1, 9.0))
    out = pipe(PROMPTS, **CALL | {"output_type": "pil"}, guidance=guidance)
    again = pipe.repeat(out.settings[1], progress=False)
    assert again.images[0].tobytes() == out.images[1].tobytes()
    assert from_settings(again.settings[0]["guidance"]) == (guidance,)


def test_the_engine_says_that_it_steps_aside(tiny) -> None:
    pipe = ldmfast.Pipeline.tiny()
    given = (APG(), CFG(stop=0.5), CFG(rescale=0.5))
    expected = {g: tiny["exact"](PROMPTS[0], **CALL, guidance=g).images for g in given}
    pipe.engine = Engine(RecordedGraphs())
    with pytest.warns(RuntimeWarning, match="runs eagerly.*APG is not linear"):
        assert torch.equal(pipe(PROMPTS[0], **CALL, guidance=APG()).images, expected[APG()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(PROMPTS[0], **CALL, guidance=APG())  # said once
        pipe(PROMPTS[0], **CALL, guidance=CFG(scale=3.0))
        for guidance in given[1:]:
            assert torch.equal(pipe(PROMPTS[0], **CALL, guidance=guidance).images, expected[guidance])
    assert len(pipe.engine) == 4  # rescaled, guided, and where guidance ends with it and without


@pytest.mark.parametrize("make", [
    lambda: CFG(scale="7"), lambda: CFG(scale=float("nan")), lambda: CFG(schedule="square"), lambda: CFG(schedule=[]),
    lambda: CFG(schedule=["a"]), lambda: CFG(start=0.9, stop=0.1), lambda: CFG(start=-1), lambda: CFG(sigmas=(3, 1)),
    lambda: CFG(sigmas=(1,)), lambda: CFG(rescale=-0.5), lambda: APG(norm_threshold=-1), lambda: APG(momentum="m"),
    lambda: CFGZero(zero_init_steps=0.5), lambda: SkipLayer(layers=[]), lambda: SkipLayer(layers=["a"]),
    lambda: from_settings([{"name": "CFGG"}]), lambda: from_settings([{"name": "CFG", "weight": 1}])])
def test_bad_guidances_are_refused(make) -> None:
    with pytest.raises(ldmfast.LdmfastError) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("extra, words", [
    ({"guidance": 7.5}, "guidance=7.5 is not a guidance"), ({"guidance": [CFG(), APG()]}, "CFG and APG both stand"),
    ({"guidance": CFG(schedule=[1, 2])}, "2 scales for 8 steps"),
    ({"guidance": CFG(rescale=0.5), "guidance_rescale": 0.5}, "guidance_rescale=0.5 and rescale=0.5"),
    ({"guidance": CFGZero(zero_init_steps=1)}, "predict a velocity"),
    ({"guidance": SkipLayer(layers=[99])}, "not numbers of blocks, 0 to")])
def test_bad_calls_are_refused(tiny, extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ldmfast.LdmfastError, match=words):
        tiny["exact"](PROMPTS[0], **CALL, **extra)
