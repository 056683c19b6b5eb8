"""accelerate() of diffusers' SD3 and FLUX transformers."""

from __future__ import annotations

import contextlib
import copy

import accelerate_models as make
import pytest
import torch

import ldmfast

KINDS = {"sd3": make.sd3, "flux": make.flux}


def controls(model, batch: int = 2):
    g = torch.Generator().manual_seed(5)
    tokens = 42 if isinstance(model, make.SD3Transformer2DModel) else 20
    drawn = [torch.randn(batch, tokens, 64, generator=g) for _ in range(3)]
    if tokens == 42:
        return {"block_controlnet_hidden_states": drawn[:2]}
    return {"controlnet_block_samples": drawn[:1], "controlnet_single_block_samples": drawn[1:],
            "controlnet_blocks_repeat": True}


@pytest.mark.filterwarnings("error:ldmfast")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extra", ["plain", "controlnet", "kwargs", "train"])
@torch.no_grad()
def test_every_argument_is_honoured(kind, extra, native_calls):
    theirs = KINDS[kind]()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    given = make.joint_inputs(theirs)
    if extra == "controlnet":
        given |= controls(theirs)
    elif extra == "kwargs":
        given |= {"joint_attention_kwargs": {"scale": 0.5}, **({"skip_layers": [1]} if kind == "sd3" else {})}
    elif extra == "train":
        ours.train()

    out, wanted = ours(**copy.deepcopy(given)), theirs(**copy.deepcopy(given))

    assert type(out) is type(wanted) and out.sample.stride() == wanted.sample.stride()
    torch.testing.assert_close(out.sample, wanted.sample, rtol=0, atol=1e-4)
    assert torch.equal(ours(**copy.deepcopy(given), return_dict=False)[0], out.sample)
    assert native_calls == [type(theirs).__name__] * 2
    if extra == "controlnet":
        assert (wanted.sample - theirs(**make.joint_inputs(theirs)).sample).abs().max() > 1e-3
    restored = ldmfast.restore(ours).eval()
    assert torch.equal(restored(**copy.deepcopy(given)).sample, wanted.sample)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision, limit", [("bf16", 0.02), ("int8", 0.05)])
@torch.no_grad()
def test_lower_precisions(kind, precision, limit, native_calls):
    theirs = KINDS[kind]()
    ours = ldmfast.accelerate(copy.deepcopy(theirs), precision=precision)
    given = make.joint_inputs(theirs)
    out, wanted = ours(**given).sample, theirs(**given).sample
    off = float((out - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    assert out.dtype == torch.float32 and 0 < off < limit and native_calls


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_changed_blocks_run_diffusers_own_forward(kind, native_calls):
    """A hook on a block, an IP-Adapter's argument, a replaced weight: seen at the next call."""
    theirs = KINDS[kind]()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    given = make.joint_inputs(theirs)
    block = ours.transformer_blocks[0]
    handle = block.register_forward_hook(lambda m, a, out: tuple(2 * x for x in out))
    with pytest.warns(UserWarning, match="has a forward hook"):
        doubled = ours(**given).sample
    assert not native_calls and (doubled - theirs(**given).sample).abs().max() > 1e-3
    handle.remove()
    block.ff.net[2].weight.mul_(1.5)
    theirs.transformer_blocks[0].ff.net[2].weight.mul_(1.5)
    torch.testing.assert_close(ours(**given).sample, theirs(**given).sample, rtol=0, atol=1e-4)
    assert native_calls


@torch.no_grad()
def test_a_cache_of_diffusers_is_honoured_and_fast_again_when_disabled(native_calls):
    """diffusers leaves its empty registry of hooks in the blocks: after disable_cache all calls fell back for good."""
    from diffusers import FirstBlockCacheConfig

    theirs = make.flux()
    ours = ldmfast.accelerate(copy.deepcopy(theirs))
    given = make.joint_inputs(theirs)
    first = ours(**given).sample
    for times in (1, 2):  # the registry of the first time is there when the second cache comes
        for model in (ours, theirs):
            model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        with pytest.warns(UserWarning, match="cache") if times == 1 else contextlib.nullcontext():
            pairs = [[model(**given | {"hidden_states": given["hidden_states"] * x}).sample for x in (1, 2)]
                     for model in (_in_context(ours), _in_context(theirs))]
        assert torch.equal(torch.stack(pairs[0]), torch.stack(pairs[1])) and len(native_calls) == times
        for model in (ours, theirs):
            model.disable_cache()
        assert torch.equal(ours(**given).sample, first) and len(native_calls) == times + 1


def _in_context(model):
    """diffusers' caches keep their state for each branch of guidance, which a pipeline names."""

    def call(**given):
        with model.cache_context("cond"):
            return model(**given)

    return call
