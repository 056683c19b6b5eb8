"""accelerate(pipeline, cache=...): against diffusers' own caches and our own pipeline; what a call leaves behind."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import joint_folders
import numpy as np
import pytest
import torch
import transformer_folders
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks import apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context

import ldmfast
from ldmfast.accelerated import cached
from ldmfast.caches import (
    FORA,
    PAB,
    CFGCache,
    DeepCache,
    EasyCache,
    FirstBlock,
    ParaStep,
    PromptKV,
    TaylorSeer,
    TGate,
)

TINY = "ldmfast/assets/tiny"
TEXT = "a red circle above a blue square"


@pytest.fixture(autouse=True)
def diffusers_classes_as_they_were(monkeypatch):
    """Those of accelerated pipelines have a call of ours until they are restored."""
    made, plain = [], ldmfast.accelerate
    monkeypatch.setattr(ldmfast, "accelerate", lambda obj, **options: made.append(obj) or plain(obj, **options))
    yield
    for obj in made:
        ldmfast.restore(obj)


def sd(kind: type = diffusers.StableDiffusionPipeline) -> Any:
    pipe = kind.from_pretrained(TINY, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, seed: int = 3, **options: Any) -> Any:
    given = {"prompt": TEXT, "num_inference_steps": 6, "output_type": "latent",
             "generator": torch.Generator().manual_seed(seed), **options}
    if isinstance(pipe, diffusers.DiTPipeline):
        given = {"class_labels": [3], **{k: v for k, v in given.items() if k not in ("prompt", "output_type")},
                 "output_type": "np"}
    elif not isinstance(pipe, diffusers.StableDiffusionPipeline):
        given = {"height": 64, "width": 64, **given}
    return pipe(**given)


def pictures(*words: Any, **options: Any) -> np.ndarray:
    return np.asarray(call(*words, **options).images)


@pytest.mark.parametrize("cache", [DeepCache(interval=3), FORA(interval=2), PAB(self_times=(0, 1000)),
                                   EasyCache(threshold=1.0), TGate(gate=3, single=False),
                                   TaylorSeer(interval=2, on="output"),
                                   [DeepCache(interval=2), TGate(gate=3, single=False)]], ids=str)
def test_as_our_own_pipeline_with_the_same_cache(cache: Any) -> None:
    theirs, ours = sd(), ldmfast.Pipeline.tiny()
    ldmfast.accelerate(theirs, cache=cache)
    out = call(theirs, guidance_scale=5.0)
    own = ours(TEXT, cache=cache, num_inference_steps=6, guidance_scale=5.0, output_type="latent", progress=False,
               generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(out.images, own.images, rtol=0, atol=1e-3)
    assert out.report.decisions == own.report.decisions and any(out.report.decisions[0])
    plain = call(sd(), guidance_scale=5.0).images
    assert (out.images - plain).abs().max() > 1e-2


STEPS = tuple(s for s in range(6) if s < 2 or (s - 3) % 2 == 0)  # of diffusers' cache_interval 2 from step 2
LAYERS = r"transformer_blocks\.\d+\.(attn|attn2|ff|ff_context)"


@pytest.mark.parametrize("make, cache, config", [
    (joint_folders.flux, FirstBlock(threshold=0.8), FirstBlockCacheConfig(threshold=0.8)),
    (joint_folders.sd3, TaylorSeer(interval=STEPS, order=1), TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=2, max_order=1, cache_identifiers=[LAYERS],
        taylor_factors_dtype=torch.float32))], ids=["first block", "taylor"])
def test_as_diffusers_own_caches(make: Any, cache: Any, config: Any) -> None:
    theirs, ours = make(), ldmfast.accelerate(make(), cache=cache)
    if isinstance(config, TaylorSeerCacheConfig):
        apply_taylorseer_cache(theirs.transformer, config)
        _set_cache_context(theirs.transformer, CacheContext("run"))
    else:
        theirs.transformer.enable_cache(config)
    expected, found = pictures(theirs), call(ours)
    np.testing.assert_allclose(np.asarray(found.images), expected, rtol=0, atol=1e-3)
    assert sum(found.report.reused.values()) + sum(found.report.forecast.values()) > 0
    assert np.abs(pictures(make()) - expected).max() > 1e-2  # it does change something


@pytest.mark.parametrize("precision", ["exact", "bf16", "int8"])
def test_without_reuse_no_bit_changes(precision: str) -> None:
    pipe = sd()
    plain = pictures(ldmfast.accelerate(pipe, precision=precision))
    for off in (DeepCache(interval=1), TaylorSeer(interval=1, on="output"), FirstBlock(threshold=0)):
        assert np.array_equal(pictures(ldmfast.accelerate(pipe, precision=precision, cache=off)), plain)
    ldmfast.accelerate(pipe, precision=precision, cache=TaylorSeer(interval=3, on="output"))
    cached = pictures(pipe)
    assert not np.array_equal(cached, plain) and np.array_equal(pictures(pipe), cached)  # every call starts anew
    assert np.array_equal(pictures(ldmfast.accelerate(pipe, precision=precision)), plain)  # and without a cache again
    ldmfast.restore(ldmfast.accelerate(pipe, cache=DeepCache()))
    assert np.array_equal(pictures(pipe), pictures(sd())) and not hasattr(call(pipe), "report")


@pytest.mark.parametrize("make, options, streams", [
    (joint_folders.flux, {"true_cfg_scale": 3.0, "negative_prompt": "grey"}, 2),  # two forwards a step
    (joint_folders.sd3, {}, 1), (transformer_folders.pixart, {"use_resolution_binning": False}, 1)],
    ids=["flux, two forwards", "sd3", "pixart"])
def test_every_forward_of_a_step_has_its_own_session(make: Any, options: dict[str, Any], streams: int) -> None:
    pipe = ldmfast.accelerate(make(), cache=TaylorSeer(interval=(0, 2, 4), on="output", order=0))
    report = call(pipe, **options).report
    assert report.evaluations == (3,) * streams and report.steps == 6
    assert report.decisions == (("", "output") * 3,) * streams


def test_solvers_that_evaluate_twice_and_pictures_that_start_later() -> None:
    pipe = sd()
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    ldmfast.accelerate(pipe, cache=TaylorSeer(interval=2, first=1, on="output", order=0))
    report = call(pipe, num_inference_steps=4).report
    assert report.steps == 7 and report.evaluations == (4,)
    photo = sd(diffusers.StableDiffusionImg2ImgPipeline)
    ldmfast.accelerate(photo, cache=TaylorSeer(interval=2, first=1, on="output", order=0))
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    out = photo(TEXT, image=image, strength=0.5, num_inference_steps=8, generator=torch.Generator().manual_seed(1))
    decisions = out.report.decisions[0]
    assert len(decisions) == 8 and decisions[:4] == ("",) * 4 and decisions.count("output") == 2


def test_a_batch_that_changes_within_a_call() -> None:
    """Guidance that a callback ends: half of the rows, which meet a session of their own."""
    def end(pipe, step, t, tensors):
        if step == 2:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    pipe = ldmfast.accelerate(sd(), cache=DeepCache(interval=2))
    out = call(pipe, callback_on_step_end=end, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert torch.isfinite(out.images).all() and len(out.report.decisions) == 2


def test_threads_share_nothing() -> None:
    pipe = ldmfast.accelerate(sd(), cache=[DeepCache(interval=3), TaylorSeer(interval=2, on="output")])
    given = [(seed, {"num_inference_steps": 4 + seed % 3}) for seed in range(6)]
    expected = [pictures(pipe, seed, **options) for seed, options in given]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda g: pictures(pipe, g[0], **g[1]), given))
    assert all(map(np.array_equal, found, expected))


def test_copies_and_pickles_keep_it() -> None:
    pipe = ldmfast.accelerate(sd(), cache=TaylorSeer(interval=2, on="output"))
    expected = pictures(pipe)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert np.array_equal(pictures(other), expected)
        ldmfast.restore(other)


@pytest.mark.parametrize("cache, words", [
    (TGate(), "one branch of guidance alone.*single=False"), (CFGCache(), "one branch of guidance alone"),
    (ParaStep(), "order of its own"), (PromptKV(), "does not have|PromptKV"), ("DeepCache", "not a cache policy"),
    ([DeepCache(), DeepCache()], "both decide"), (DeepCache(branch=99), "branch=99")], ids=str)
def test_what_does_not_suit_is_refused_before_anything_is_changed(cache: Any, words: str) -> None:
    pipe = transformer_folders.dit() if isinstance(cache, PromptKV) else sd()
    with pytest.raises(ldmfast.LdmfastError, match=words):
        ldmfast.accelerate(pipe, cache=cache)
    assert not hasattr(pipe, "ldmfast_report")
    assert "forward" not in vars(getattr(pipe, "unet", None) or pipe.transformer)


def test_without_timesteps_diffusers_own_forward_runs_and_says_so() -> None:
    """A loop that takes its times from elsewhere."""
    class Elsewhere(diffusers.DDIMScheduler):
        timesteps = property(lambda self: torch.tensor([]), lambda self, value: setattr(self, "own", value))

    pipe = ldmfast.accelerate(sd(), cache=DeepCache())
    pipe.scheduler = Elsewhere.from_config(pipe.scheduler.config)
    unet = pipe.unet
    x, text = torch.randn(1, unet.config.in_channels, 8, 8), torch.randn(1, 7, unet.config.cross_attention_dim)
    with cached.running(pipe), torch.no_grad():
        with pytest.warns(UserWarning, match="own forward.*no timesteps"):
            found = unet(x, 10, text).sample
        assert torch.equal(found, type(unet).forward(unet, x, 10, text).sample)


def test_a_model_alone_has_no_calls() -> None:
    unet = sd().unet
    with pytest.raises(ldmfast.LdmfastError, match="cache= needs a diffusers pipeline"):
        ldmfast.accelerate(unet, cache=DeepCache())
    assert "forward" not in vars(unet)
