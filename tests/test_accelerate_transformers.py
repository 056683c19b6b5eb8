"""accelerate() on diffusers' diffusion transformers: their results, and their own forward where ours does not fit."""

from __future__ import annotations

import copy

import accelerate_models as make
import pytest
import torch
from accelerate_models import inputs

import ldmfast

DIT = dict(timestep=torch.tensor([37, 900]), class_labels=torch.tensor([3, 10]))
PROMPT = dict(encoder_hidden_states=torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(5)),
              timestep=torch.tensor([37, 900]))
SIZES = {"resolution": torch.tensor([[512.0, 300.0], [128.0, 90.0]]), "aspect_ratio": torch.tensor([[0.6], [1.4]])}
CALLS = {
    "dit": (make.dit, DIT, {}),
    "dit, larger": (make.dit, DIT, {"size": 12}),
    "pixart": (make.pixart, PROMPT, {}),
    "prompt mask": (make.pixart, PROMPT | {"encoder_attention_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4])}, {}),
    "prompt bias": (make.pixart, PROMPT | {"encoder_attention_mask": torch.randn(2, 1, 7)}, {}),
    "self mask": (make.pixart, PROMPT | {"attention_mask": (torch.arange(128).view(2, 64) % 3 > 0).long()}, {}),
    "micro-conditions": (lambda: make.pixart(use_additional_conditions=True),
                         PROMPT | {"added_cond_kwargs": SIZES}, {}),
}


def pair(model):
    return ldmfast.accelerate(copy.deepcopy(model)), model


@pytest.mark.filterwarnings("error:ldmfast")
@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_every_condition_is_honoured(name, native_calls):
    build, given, shape = CALLS[name]
    ours, theirs = pair(build())
    x = inputs(**shape)[0]
    out, expected = ours(x, **given), theirs(x, **given)
    assert type(out) is type(expected)
    torch.testing.assert_close(out.sample, expected.sample, rtol=0, atol=1e-4)
    assert out.sample.stride() == expected.sample.stride()
    assert torch.equal(ours(x, **given, return_dict=False)[0], out.sample)
    assert native_calls == [type(theirs).__name__] * 2


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@torch.no_grad()
def test_low_precision_and_restore(precision, native_calls):
    for build, given in ((make.dit, DIT), (make.pixart, PROMPT)):
        model = build()
        x = inputs()[0]
        expected = model(x, **given).sample
        out = ldmfast.accelerate(model, precision)(x, **given).sample
        assert out.dtype == expected.dtype and 0 < (out - expected).norm() / expected.norm() < 0.05
        assert torch.equal(ldmfast.restore(model)(x, **given).sample, expected)
    assert len(native_calls) == 2


@torch.no_grad()
def test_weights_changed_in_place_are_followed(native_calls):
    """Also those of one block's embedder, which a packed DiT shares with the other blocks as long as they are equal."""
    for precision, tolerance in (("exact", 1e-4), ("bf16", 0.03)):
        ours, theirs = make.dit(), make.dit()
        for model in (ours, theirs):  # as in published models
            model.transformer_blocks[1].norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
        ldmfast.accelerate(ours, precision)
        x = inputs()[0]
        first = ours(x, **DIT).sample
        for model in (ours, theirs):
            model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.mul_(5)
        out, expected = ours(x, **DIT).sample, theirs(x, **DIT).sample
        assert (out - expected).norm() <= tolerance * expected.norm()
        assert (out - first).norm() > 0.1 * expected.norm()


@torch.no_grad()
def test_diffusers_runs_what_ours_does_not(native_calls):
    """Labels that are dropped at random in train(), a picture that is not square, a hook on a block."""
    ours, theirs = pair(make.dit())
    x = inputs()[0]
    for model in (ours, theirs):
        model.train()
    with pytest.warns(UserWarning, match="class labels are dropped in train"):
        torch.manual_seed(0)
        out = ours(x, **DIT).sample
    torch.manual_seed(0)
    assert torch.equal(out, theirs(x, **DIT).sample)
    ours.eval()
    # 8 x 2 patches, which diffusers folds into 4 x 4
    wide = torch.randn(2, 4, 16, 4)
    with pytest.warns(UserWarning, match="square"):
        assert torch.equal(ours(wide, **DIT).sample, theirs.eval()(wide, **DIT).sample)
    seen = []
    ours.transformer_blocks[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="forward hook"):
        ours(x, **DIT)
    assert seen and native_calls == []
