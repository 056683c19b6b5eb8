"""The graph engine on its CPU stand-in, with caches and guidances: one recording for each kind of stage, replayed bit
for bit as eager runs it, or a named warning."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import joint_folders
import pytest
import torch
from test_engine import TEXT, loud

import ldmfast
from ldmfast.caches import (
    FORA,
    PAB,
    POLICIES,
    CFGCache,
    DeepCache,
    EasyCache,
    FirstBlock,
    Guard,
    MagCache,
    ParaStep,
    Policy,
    PromptKV,
    TaylorSeer,
    TeaCache,
    TGate,
)
from ldmfast.engine import CaptureError, Engine, RecordedGraphs
from ldmfast.engine import loop as loops
from ldmfast.guidance import CFG, GUIDANCES, Compose

assert loud  # every test here fails when a run falls back to eager without being asked
CALL = {"num_inference_steps": 7, "generator": 4, "output_type": "latent", "progress": False, "solver": "dpmpp_2m"}


@pytest.fixture(scope="module")
def tiny() -> ldmfast.Pipeline:
    return ldmfast.Pipeline.tiny()


def run(pipe: ldmfast.Pipeline, engine: Engine | None, *words: Any, **options: Any) -> Any:
    pipe.engine = engine
    try:
        return pipe(*words, **{**CALL, **options})
    finally:
        pipe.engine = None


def same(pipe: ldmfast.Pipeline, engine: Engine, *words: Any, **options: Any) -> None:
    eager, out = run(pipe, None, *words, **options), run(pipe, engine, *words, **options)
    assert torch.isfinite(eager.images).all() and torch.equal(out.images, eager.images)
    if eager.report is None:
        assert out.report is None
        return
    assert dataclasses.replace(out.report, bytes=0) == dataclasses.replace(eager.report, bytes=0)
    assert out.report.bytes >= eager.report.bytes  # the buffers are there all the time


RATIOS = (1.0, 0.99, 0.98, 0.97, 0.99, 0.98, 0.97)
# policies, how many kinds of stages they make, and others that find all of theirs recorded
STATIC: dict[str, tuple[Any, int, Any]] = {
    "deep": (DeepCache(interval=3), 3, DeepCache(interval=(0, 4, 6))),  # the last is computed, and nobody needs it
    "layers in 8 bits": (FORA(interval=4, int8=True), 2, FORA(interval=(0, 3, 5), int8=True)),
    "attention": (PAB(cross_times=(200, 700)), 5, None),
    # forecasts of 1, 2 and 3 values are sums of their own
    "layers forecast": (TaylorSeer(interval=2, order=2, first=1), 5, TaylorSeer(interval=(0, 1, 2, 4), order=2)),
    "output forecast": (TaylorSeer(interval=3, on="output"), 2, TaylorSeer(interval=2, on="output")),
    "residual forecast": (TaylorSeer(interval=3, on="stack"), 2, None),
    "residual": (MagCache(ratios=RATIOS, threshold=0.1), 2, None),
    "one branch": (TGate(gate=3), 4, None),  # before, the last before, the first after, and after guidance ends
    "two branches": (TGate(gate=3, single=False), 3, TGate(gate=5, single=False)),
    "other branches": (CFGCache(interval=3), 2, CFGCache(interval=(0, 1, 5))),
    "other branches and layers": ([CFGCache(interval=(0, 3), order=0), FORA(interval=2)], 5, None),
    "other branches and output": ([CFGCache(interval=(0, 4)), TaylorSeer(interval=2, on="output")], 4, None),
    "one in another": ([DeepCache(interval=3), FORA(interval=2)], 5, None),
}


@pytest.mark.parametrize("name", STATIC)
def test_a_cache_with_a_plan_is_replayed_by_kinds_of_stages(tiny, name):
    """Two pictures in exact precision: two forwards, each with a cache of its own."""
    cache, kinds, other = STATIC[name]
    graphs = RecordedGraphs()
    engine = Engine(graphs)
    same(tiny, engine, [TEXT, "a green star"], cache=cache)
    assert graphs.captures == len(engine) == kinds
    same(tiny, engine, ["a blue circle", TEXT], cache=cache, generator=7, guidance_scale=3.0)
    if other is not None:
        same(tiny, engine, [TEXT, "a green star"], cache=other)
    assert graphs.captures == kinds


JOINT = {"prompts": (joint_folders.sd3, PromptKV(interval=2), 3), "layers": (joint_folders.flux, FORA(interval=2), 3),
         "forecast": (joint_folders.sd3, TaylorSeer(interval=3, order=1), 3)}


@pytest.mark.parametrize("name", JOINT)
def test_joint_transformers_keep_text_and_picture(name, tmp_path):
    make, cache, kinds = JOINT[name]
    make().save_pretrained(tmp_path)
    pipe, graphs = ldmfast.Pipeline.from_pretrained(tmp_path), RecordedGraphs()
    options = {"height": 64, "width": 64, "num_inference_steps": 5, "cache": cache}
    engine = Engine(graphs)
    for text in ("a red cat", "the moon"):
        same(pipe, engine, text, **options)
    assert graphs.captures == len(engine) == kinds


STOPS, BOTH = CFG(start=0.2, stop=0.7), [CFG(start=0.5), Compose(prompts=["a white wall"], scales=[2.0])]
INTERVALS = [  # guidance, solver, and captures so far
    (STOPS, "dpmpp_2m", 2), (STOPS, "heun", 4), (CFG(sigmas=(0.5, 3.0)), "dpmpp_2m", 4),
    (CFG(stop=0.8, schedule="linear"), "heun", 4),
    (BOTH, "dpmpp_2m", 5),  # the other prompt is against the negative one, which is thus needed everywhere
    (CFG(), "dpmpp_2m", 6)]


def test_guidance_in_an_interval_is_two_kinds_of_stages(tiny):
    graphs = RecordedGraphs()
    engine = Engine(graphs)
    for guidance, solver, captures in INTERVALS:
        same(tiny, engine, TEXT, guidance=guidance, num_inference_steps=4, solver=solver)
        assert graphs.captures == captures, (guidance, solver)


def test_cancelling_counts_what_has_run(tiny):
    def cancel(call, step, t, tensors):
        if step == 3:
            call.cancel()

    engine = Engine(RecordedGraphs())
    for cache in (DeepCache(interval=2), TGate(gate=2)):
        same(tiny, engine, TEXT, cache=cache, callback_on_step_end=cancel)
    assert run(tiny, engine, TEXT, cache=DeepCache(interval=2), callback_on_step_end=cancel).report.evaluations == (4,)


def test_kinds_of_stages_that_are_not_used_are_let_go(tiny, monkeypatch):
    monkeypatch.setattr(loops, "_MOST_KINDS", 3)
    graphs = RecordedGraphs()
    engine = Engine(graphs)
    many, few = STATIC["layers forecast"][0], STATIC["layers forecast"][2]
    for cache, captures, kept in ((many, 5, 5), (few, 5, 3), (many, 7, 5)):
        same(tiny, engine, TEXT, cache=cache)
        assert (graphs.captures, len(engine)) == (captures, kept)


def test_a_kind_of_stage_that_cannot_be_captured_leaves_the_call_eager(tiny):
    class Two(RecordedGraphs):
        def capture(self, body):
            if self.captures == 2:
                raise CaptureError("no third")
            return super().capture(body)

    graphs = Two()
    engine, options = Engine(graphs), {"cache": DeepCache(interval=3)}
    with pytest.warns(RuntimeWarning, match=r"without CUDA graphs: it cannot be captured \(no third\)"):
        same(tiny, engine, TEXT, **options)
    same(tiny, engine, TEXT, **options)  # silent now, and not tried again
    assert graphs.captures == 2 and len(engine) == 0


EAGER = {  # what no graph can follow, and why
    "teacache": ({"cache": TeaCache()}, "the cache TeaCache decides at every step by a number that is read on the h"),
    "easycache": ({"cache": [EasyCache(), FORA()]}, "the cache EasyCache decides at every step"),
    "first block": ({"cache": FirstBlock()}, "the cache FirstBlock decides at every step"),
    "guard": ({"cache": Guard(policy=FirstBlock(), limit=1.0)}, "the cache Guard decides at every step"),
    "parastep": ({"cache": ParaStep()}, "ParaStep takes the steps in an order of its own"),
    "cache and interval": ({"cache": DeepCache(), "guidance": CFG(stop=0.5)}, "a cache, and guidance that does not do"),
    "rescaled interval": ({"guidance": CFG(stop=0.5, rescale=0.3)}, "rescaled, and does not do the same"),
}


@pytest.mark.parametrize("name", EAGER)
def test_what_runs_eagerly_says_why(tiny, name):
    options, words = EAGER[name]
    with pytest.warns(RuntimeWarning, match=f"runs eagerly, without CUDA graphs: .*{words}"):
        same(tiny, Engine(RecordedGraphs()), TEXT, num_inference_steps=3, **options)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "MagCache": {"ratios": RATIOS}, "Guard": {"policy": FirstBlock(), "limit": 1.0},
    "Compose": {"prompts": ["a white wall"], "scales": [2.0]}, "SkipLayer": {"layers": [1], "stop": 1.0},
    "Energy": {"energy": lambda x: x.square().mean((1, 2, 3))},
    "Classifier": {"log_prob": lambda x, t: -x.square().mean((1, 2, 3))}}


@pytest.mark.parametrize("name", [*POLICIES, *GUIDANCES])
def test_no_policy_and_no_guidance_is_slow_in_silence(tiny, name):
    """Either the whole loop is replayed, or the call says that it is not."""
    arguments = dict(ARGUMENTS.get(name, {}))
    if name == "AutoGuidance":
        arguments["weak"] = ldmfast.Pipeline.tiny().unet
    made = {**POLICIES, **GUIDANCES}[name](**arguments)
    graphs = RecordedGraphs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        argument = "cache" if isinstance(made, Policy) else "guidance"
        run(tiny, Engine(graphs), TEXT, num_inference_steps=2, **{argument: made})
    told = [w for w in caught if "runs eagerly, without CUDA graphs" in str(w.message)]
    assert len(told) == (graphs.captures == 0)
