"""accelerate() of diffusers' SD3 and FLUX transformers."""

from __future__ import annotations

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
