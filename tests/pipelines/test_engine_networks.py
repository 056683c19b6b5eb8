"""The graph engine on its CPU stand-in, beyond UNets: transformers, and adapters that come and go between calls."""

from __future__ import annotations

import sys
from pathlib import Path

import joint_folders
import pytest
import torch
import transformer_folders
from test_engine import call, loud

import ldmfast
from ldmfast.engine import Engine, RecordedGraphs
from ldmfast.models.transformer_blocks import TransformerState

sys.path.insert(0, str(Path(__file__).parents[1] / "loras"))
import lora_cases

assert loud  # every test here fails when a run falls back to eager without being asked
SIZE = {"height": 64, "width": 64, "num_inference_steps": 3, "generator": [1, 2]}
CALLS = {  # network -> how it is made, first call, and calls that need no other graph
    "dit": (transformer_folders.dit, {"class_labels": [7, 999], "solver": "ddim", "num_inference_steps": 3},
            [{"class_labels": [3, 5], "guidance_scale": 2.0, "num_inference_steps": 5}]),
    "pixart": (transformer_folders.pixart,
               {**SIZE, "prompt": ["a red cat", "two dogs"], "use_resolution_binning": False},
               [{"prompt": ["the red moon", "old house"], "guidance_scale": 2.0}]),
    "sd3": (joint_folders.sd3, {**SIZE, "prompt": ["a red cat", "two dogs"]},
            [{"prompt": ["the moon", "rain"], "guidance_scale": 3.0, "num_inference_steps": 4}]),
    "flux": (joint_folders.flux, {**SIZE, "prompt": ["a red cat", "two dogs"]},
             [{"prompt": ["the moon", "rain"], "guidance_scale": 2.0, "num_inference_steps": 4}]),
}


@pytest.fixture(scope="module", params=CALLS)
def network(request, tmp_path_factory):
    make, first, others = CALLS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make().save_pretrained(folder)
    return folder, {"generator": [1, 2], **first}, others


@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_a_replayed_call_of_a_transformer_is_the_eager_one(network, precision):
    """Timesteps, prompts, labels, angles, scale, steps and seeds are read from buffers: one loop and one decoder."""
    folder, first, others = network
    pipe, graphs = ldmfast.Pipeline.from_pretrained(folder, precision=precision), RecordedGraphs()
    engine = Engine(graphs)
    for change in ({}, *others, {}):
        options = {**first, **change}
        eager = call(pipe, None, **options)
        assert torch.isfinite(eager).all() and eager.std() > 0.01
        assert torch.equal(call(pipe, engine, **options), eager)
    assert graphs.captures == len(engine) == 2


def test_another_size_is_another_graph_and_positions_outlive_their_cache(tmp_path):
    """A CUDA graph reads positions where they lay: it must keep them, whatever the cache of them lets go."""
    from ldmfast.models.transformer_blocks import sincos_2d

    transformer_folders.pixart().save_pretrained(tmp_path)
    pipe, graphs = ldmfast.Pipeline.from_pretrained(tmp_path), RecordedGraphs()
    engine, options = Engine(graphs), {**SIZE, "prompt": ["a red cat", "two dogs"], "use_resolution_binning": False}
    eager = [call(pipe, None, **{**options, "width": w}) for w in (64, 96)]
    sincos_2d.cache_clear()
    for i, width in ((0, 64), (1, 96), (0, 64)):
        assert torch.equal(call(pipe, engine, **{**options, "width": width}), eager[i])
    assert graphs.captures == 4
    loops = [e.work for e in engine._entries.values() if hasattr(e.work, "positions")]
    kept, f = {id(loop.positions) for loop in loops}, pipe.vae_scale_factor
    assert len(kept) == 2 and kept == {id(x) for x in (
        pipe.unet.pos_embed.positions(torch.empty(1, 4, 64 // f, w // f)) for w in (64, 96))}


def test_named_reasons_of_transformers(tmp_path, monkeypatch):
    joint_folders.sd3(with_t5=False).save_pretrained(tmp_path)
    pipe = ldmfast.Pipeline.from_pretrained(tmp_path)
    engine, options = Engine(RecordedGraphs()), {**SIZE, "prompt": ["a cat", "a dog"]}
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with pytest.warns(RuntimeWarning, match="runs eagerly.*skip-layer guidance evaluates another network"):
        out = call(pipe, engine, **options, **skipping)
    assert torch.equal(out, call(pipe, None, **options, **skipping))
    large = TransformerState({0.0: 0}, None, None, torch.zeros(1, 2, 1, 8))
    forward = type("Forward", (), {"states": [large]})()
    denoiser = type("Denoiser", (), {"forwards": [[forward]], "sessions": []})()
    with pytest.warns(RuntimeWarning, match="modulations of all steps would not fit"):
        assert engine.sample(denoiser, torch.zeros(1), table=None) is None


@pytest.fixture(scope="module")
def with_adapters(tmp_path_factory):
    theirs = lora_cases.diffusers_pipeline()
    folder = tmp_path_factory.mktemp("adapters")
    theirs.save_pretrained(folder)
    pipe = ldmfast.Pipeline.from_pretrained(folder)
    for name, seed, rank in (("a", 1, 4), ("b", 2, 4), ("wide", 3, 6)):
        pipe.load_lora_weights(lora_cases.kohya(lora_cases.draw(theirs, seed, rank)), name)
    pipe.disable_lora()
    return pipe


def test_adapters_that_change_need_no_capture(with_adapters):
    """Weights and names of adapters are numbers in buffers; only other ranks or layers are another graph."""
    pipe, graphs = with_adapters, RecordedGraphs()
    engine, options = Engine(graphs), {**SIZE, "generator": 1}
    choices = [None, "a", {"a": 0.4}, "b", {"b": -1.0}, "a", None, "wide", {"wide": 2.0}, "b"]
    eager = [call(pipe, None, "a cat", **options, loras=c) for c in choices]
    assert len({tuple(x.flatten()[:50].tolist()) for x in eager}) == 7
    captures = []
    for choice, wanted in zip(choices, eager):
        assert torch.equal(call(pipe, engine, "a cat", **options, loras=choice), wanted), choice
        captures.append(graphs.captures)
    # the plain network and the decoder; adapters of rank 4; of rank 6
    assert captures == [2, 3, 3, 3, 3, 3, 3, 4, 4, 4]


def test_a_swap_leaves_the_adapters_as_they_are(with_adapters):
    pipe = with_adapters
    adapters = pipe.loaded.loras.adapters
    before = {n: [p.down.clone() for p in a.parts["unet"].values()] for n, a in adapters.items()}
    engine = Engine(RecordedGraphs())
    for name in ("a", "b"):
        call(pipe, engine, "a cat", **{**SIZE, "generator": 1}, loras=name)
    for name, downs in before.items():
        assert all(torch.equal(x, p.down) for x, p in zip(downs, adapters[name].parts["unet"].values()))


def test_a_weight_replaced_under_an_adapter_is_seen(with_adapters):
    pipe, graphs = with_adapters, RecordedGraphs()
    engine, options = Engine(graphs), {**SIZE, "generator": 1, "loras": "a"}
    before = call(pipe, engine, "a cat", **options)
    norm = pipe.unet.conv_norm_out
    kept = norm.weight
    norm.weight = torch.nn.Parameter(kept * 2, requires_grad=False)
    try:
        found = call(pipe, engine, "a cat", **options)
        assert torch.equal(found, call(pipe, None, "a cat", **options)) and not torch.equal(found, before)
    finally:
        norm.weight = kept
    assert torch.equal(call(pipe, engine, "a cat", **options), before)
