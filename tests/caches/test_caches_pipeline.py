"""``cache=`` of a call: report, settings, threads, batches, adapters, the engine, and what is refused."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch

import ldmfast
from ldmfast.caches import (
    FORA,
    PAB,
    POLICIES,
    DeepCache,
    EasyCache,
    FirstBlock,
    MagCache,
    ParaStep,
    TaylorSeer,
    TeaCache,
    TGate,
    from_settings,
    residual_ratios,
)
from ldmfast.engine import Engine, RecordedGraphs

PROMPTS = ["a red circle above a blue square", "two green triangles"]
CALL = {"num_inference_steps": 8, "generator": 4, "progress": False, "output_type": "latent"}


def test_settings_make_the_picture_again(tiny) -> None:
    pipe = tiny["exact"]
    cache = [DeepCache(interval=(0, 2, 5)), TGate(gate=6, int8=True)]
    out = pipe(PROMPTS, **CALL | {"output_type": "pil"}, cache=cache)
    again = pipe.repeat(out.settings[1], progress=False)
    assert again.images[0].tobytes() == out.images[1].tobytes()
    assert again.settings[0]["cache"] == out.settings[1]["cache"] and len(out.settings[1]["cache"]) == 2
    plain = pipe(PROMPTS, **CALL | {"output_type": "pil"})
    assert plain.images[1].tobytes() != out.images[1].tobytes() and plain.report is None


def test_the_report_counts(tiny) -> None:
    """8 evaluations, one forward a picture; attention is in 2 layers down, 1 in the middle and 4 up."""
    report = tiny["exact"](PROMPTS, **CALL, cache=FORA(interval=3)).report
    blocks = 7
    assert report.evaluations == (8, 8) and report.single == (0, 0) and report.critical_path == 8
    assert report.computed == dict.fromkeys(("self", "cross", "mlp"), 2 * blocks * 3)
    assert report.reused == dict.fromkeys(("self", "cross", "mlp"), 2 * blocks * 5)
    assert report.decisions[0] == tuple("" if s % 3 == 0 else "cross+mlp+self" for s in range(8))
    tokens = sum([64, 16, 16, 16, 16, 64, 64])
    assert report.bytes == 2 * 2 * 3 * tokens * 96 * 4  # pictures, branches, kinds; 96 channels in fp32
    report = tiny["exact"](PROMPTS[0], **CALL, cache=TGate(gate=3)).report
    assert report.single == (5,) and report.evaluations == (8,)
    report = tiny["exact"](PROMPTS[0], **CALL, cache=ParaStep(ranks=3, warmup=2)).report
    assert report.evaluations == (8,) and report.critical_path == 4


def test_gating_ends_guidance(tiny) -> None:
    """From the gate on the prediction is the conditional one with the mean of both branches' prompt attention: with a
    guidance scale of 1 throughout and equal prompts in both branches that is the plain conditional network."""
    pipe, prompt = tiny["exact"], PROMPTS[0]
    plain = pipe(prompt, **CALL, guidance_scale=3.0, negative_prompt=prompt, cache=TGate(gate=4, single=False)).images
    gated = pipe(prompt, **CALL, guidance_scale=3.0, negative_prompt=prompt, cache=TGate(gate=4)).images
    torch.testing.assert_close(gated, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", [TeaCache(threshold=0.6), FirstBlock(threshold=0.6), EasyCache(threshold=0.5),
                                   [TaylorSeer(interval=2, on="deep"), TGate(gate=4)]], ids=str)
def test_a_pictures_bits_do_not_depend_on_its_neighbour(tiny, cache: Any) -> None:
    """Exact precision decides for each picture by itself."""
    both = tiny["exact"](PROMPTS, **CALL | {"generator": [4, 5]}, cache=cache)
    alone = tiny["exact"](PROMPTS[1], **CALL | {"generator": [5]}, cache=cache)
    assert torch.equal(both.images[1:], alone.images)
    assert both.report.decisions[1] == alone.report.decisions[0]
    assert alone.report.reused or alone.report.forecast


def test_threads_share_no_features(tiny) -> None:
    pipe = tiny["bf16"]
    calls: list[dict[str, Any]] = [
        CALL | {"prompt": PROMPTS[i % 2], "generator": i, "cache": cache} for i, cache in enumerate(
            [DeepCache(), TaylorSeer(interval=2), FirstBlock(threshold=0.5), None])]
    expected = [pipe(**c).images for c in calls]
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i, c=c: found.__setitem__(i, pipe(**c).images))
               for i, c in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], e) for i, e in enumerate(expected))


def test_the_engine_says_that_it_steps_aside(tiny) -> None:
    pipe = ldmfast.Pipeline.tiny()
    expected = pipe(PROMPTS[0], **CALL, cache=TeaCache()).images
    pipe.engine = Engine(RecordedGraphs())
    with pytest.warns(RuntimeWarning, match="runs eagerly.*the cache TeaCache decides at every step"):
        assert torch.equal(pipe(PROMPTS[0], **CALL, cache=TeaCache()).images, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(PROMPTS[0], **CALL)  # and the next call without one is recorded


def test_measured_ratios_are_those_of_the_stack(tiny) -> None:
    ratios = residual_ratios(tiny["exact"], PROMPTS, **CALL)
    assert len(ratios) == 8 and ratios[0] == 1.0 and all(0.5 < r < 1.5 for r in ratios) and len(set(ratios)) == 8
    report = tiny["exact"](PROMPTS[0], **CALL, cache=MagCache(ratios=ratios, threshold=0.3)).report
    assert report.reused["stack"] > 0


@pytest.mark.parametrize("make", [
    lambda: DeepCache(interval=0), lambda: DeepCache(interval=[1, 2]), lambda: FORA(interval=2.5),
    lambda: TaylorSeer(order=4), lambda: TaylorSeer(on="blocks"), lambda: TGate(gate=0), lambda: MagCache(ratios=[]),
    lambda: FirstBlock(threshold=-1), lambda: EasyCache(threshold=float("nan")), lambda: ParaStep(ranks=True)])
def test_bad_policies_are_refused(make) -> None:
    with pytest.raises(ldmfast.LdmfastError) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cache, words", [
    ("deepcache", "is not a cache policy"), ([DeepCache(), 3], "is not a cache policy"),
    (DeepCache(branch=9), "skip connections 0 to 3"), ([DeepCache(), TaylorSeer(on="deep")], "both decide")])
def test_bad_calls_are_refused(tiny, cache: Any, words: str) -> None:
    with pytest.raises(ldmfast.LdmfastError, match=words):
        tiny["exact"](PROMPTS[0], **CALL, cache=cache)


def test_every_policy_has_a_row_in_the_docs() -> None:
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "caches.md").read_text()
    assert all(f"`{name}" in text for name in POLICIES)


@pytest.mark.parametrize("make", [
    lambda: TaylorSeer(order=1.0), lambda: TaylorSeer(first=1.5), lambda: ParaStep(ranks=2.5),
    lambda: ParaStep(warmup=float("inf")), lambda: MagCache(ratios=None), lambda: MagCache(ratios=["a"]),
    lambda: MagCache(ratios=()), lambda: MagCache(ratios="12"), lambda: TeaCache(coefficients=1.0),
    lambda: TeaCache(coefficients=()), lambda: TeaCache(threshold=float("nan")), lambda: PAB(self_times=100),
    lambda: PAB(cross_times=(100,)), lambda: PAB(self_range=1.5), lambda: TGate(gate=2.5),
    lambda: EasyCache(warmup=0.5), lambda: from_settings(["DeepCache"]), lambda: from_settings([{"name": ["x"]}]),
    lambda: from_settings([{}]),
    lambda: from_settings([{"name": "TGate", "gate": "soon"}]),
], ids=range(20))
def test_arguments_that_make_no_sense_are_named(make) -> None:
    with pytest.raises(ldmfast.LdmfastError):
        make()


def test_what_a_call_refuses(tiny) -> None:
    with pytest.raises(ldmfast.LdmfastError, match="two ParaStep"):
        tiny["exact"](PROMPTS[0], **CALL, cache=[ParaStep(), ParaStep(ranks=3)])
    with pytest.raises(ldmfast.LdmfastError, match="cache='fast' is not"):
        tiny["exact"](PROMPTS[0], **CALL, cache="fast")
    with pytest.raises(ldmfast.LdmfastError, match="leave cache out"):
        residual_ratios(tiny["exact"], PROMPTS[0], cache=None)


def test_a_round_of_steps_ends_when_it_is_cancelled(tiny) -> None:
    seen = []

    def stop(call, step, timestep, given):
        seen.append(step)
        if step == 3:
            call.cancel()
        return given

    tiny["exact"](PROMPTS[0], **CALL, cache=ParaStep(ranks=4, warmup=2), callback_on_step_end=stop)
    assert seen == [0, 1, 2, 3]


def test_a_policy_of_ones_own_is_not_repeatable(tiny) -> None:
    class Mine(DeepCache):
        pass

    assert not tiny["exact"](PROMPTS[0], **CALL, cache=Mine()).settings[0]["repeatable"]
    assert tiny["exact"](PROMPTS[0], **CALL, cache=DeepCache()).settings[0]["repeatable"]


def test_threshold_0_computes_whatever_the_polynomial(tiny) -> None:
    report = tiny["exact"](PROMPTS[0], **CALL, cache=TeaCache(threshold=0, coefficients=(-1.0, 0.0))).report
    assert not report.reused.get("stack")
