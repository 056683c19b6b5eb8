"""accelerate() and restore(): diffusers' results, with diffusers' objects."""

from __future__ import annotations

import copy
import logging

import accelerate_models as make
import diffusers
import numpy as np
import pytest
import torch
from accelerate_models import inputs

import ldmfast

TINY = "ldmfast/assets/tiny"


def pair(model):
    """The model accelerated, and an untouched copy."""
    return ldmfast.accelerate(copy.deepcopy(model)), model


def close(ours, theirs, tolerance=1e-4):
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def _residuals(model, batch=2):
    torch.manual_seed(3)
    x, t, e = inputs(batch)
    down, mid = make.controlnet()(x, t, e, controlnet_cond=torch.rand(batch, 3, 32, 32), return_dict=False)
    return dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)


def _adapters(model):
    g = torch.Generator().manual_seed(4)
    return dict(down_intrablock_additional_residuals=[torch.randn(2, 32, 8, 8, generator=g),
                                                      torch.randn(2, 64, 8, 8, generator=g)])


SDXL = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
            transformer_layers_per_block=(1, 2), use_linear_projection=True)
CONDITIONS = {
    "plain": ({}, lambda m: {}),
    "controlnet": ({}, _residuals),
    "t2i adapter": ({}, _adapters),
    "sdxl": (SDXL, lambda m: dict(added_cond_kwargs={"text_embeds": torch.randn(2, 16), "time_ids": torch.rand(2, 6)})),
    "classes": (dict(num_class_embeds=5), lambda m: dict(class_labels=torch.tensor([3, 1]))),
    "class projection": (dict(class_embed_type="projection", projection_class_embeddings_input_dim=10),
                         lambda m: dict(class_labels=torch.randn(2, 10))),
    "lcm": (dict(time_cond_proj_dim=12), lambda m: dict(timestep_cond=torch.randn(2, 12))),
    "prompt mask": ({}, lambda m: dict(encoder_attention_mask=torch.tensor([[1] * 7, [1, 1, 0, 1, 0, 0, 0]]))),
    "self mask": ({}, lambda m: dict(attention_mask=(torch.rand(2, 64) > 0.3).long())),
    "lora scale without lora": ({}, lambda m: dict(cross_attention_kwargs={"scale": 0.5})),
    "sliced attention": ({}, lambda m: m.set_attention_slice("auto") or {}),
    "checkpointing": ({}, lambda m: m.enable_gradient_checkpointing() or {}),
    "train mode": ({}, lambda m: m.train() and {}),
}


@pytest.mark.filterwarnings("error:ldmfast")
@pytest.mark.parametrize("name", CONDITIONS)
@torch.no_grad()
def test_every_condition_is_honoured(name, native_calls):
    config, condition = CONDITIONS[name]
    ours, theirs = pair(make.unet(**config))
    torch.manual_seed(2)
    given = condition(ours)
    torch.manual_seed(2)
    condition(theirs)
    bare = theirs(*inputs(), **given if name in ("sdxl", "classes", "class projection") else {}).sample

    out = ours(*inputs(), **copy.deepcopy(given))

    wanted = theirs(*inputs(), **copy.deepcopy(given)).sample
    close(out.sample, wanted)
    assert native_calls == ["UNet2DConditionModel"]
    if name in ("controlnet", "t2i adapter", "lcm", "prompt mask", "self mask"):
        assert (wanted - bare).abs().max() > 1e-3  # so a condition that was ignored would have been seen


@pytest.mark.parametrize("size, timestep", [(16, 7), (13, 7.5), (16, torch.tensor([3, 800])), (11, torch.tensor(0.25))])
@torch.no_grad()
def test_sizes_and_timesteps(size, timestep, native_calls):
    ours, theirs = pair(make.unet())
    x, _, e = inputs(size=size)

    close(ours(x, timestep, e).sample, theirs(x, timestep, e).sample)
    assert len(native_calls) == 1


@torch.no_grad()
def test_return_dict_and_keywords(native_calls):
    ours, theirs = pair(make.unet())
    x, t, e = inputs()

    tuple_out = ours(x, t, e, return_dict=False)
    named = ours(sample=x, timestep=t, encoder_hidden_states=e)

    assert type(tuple_out) is tuple and torch.equal(tuple_out[0], named.sample)
    assert type(named) is type(theirs(x, t, e)) and len(native_calls) == 2
    with pytest.raises(TypeError, match="nonsense"):
        ours(x, t, e, nonsense=1)


@torch.no_grad()
def test_memory_order_is_kept(native_calls):
    """randn_like of a channels-last tensor draws in another order: a picture would change with our layout."""
    ours, theirs = pair(make.unet())
    x, t, e = inputs()
    assert ours(x, t, e).sample.stride() == theirs(x, t, e).sample.stride()
    last = x.contiguous(memory_format=torch.channels_last)
    out, wanted = ours(last, t, e).sample, theirs.to(memory_format=torch.channels_last)(last, t, e).sample
    close(out, wanted)
    assert out.stride() == wanted.stride() and len(native_calls) == 2


@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0])])
@torch.no_grad()
def test_unet_2d(labels, native_calls):
    ours, theirs = pair(make.unet_2d(num_class_embeds=None if labels is None else 4))
    x = torch.randn(2, 3, 16, 16)

    close(ours(x, 30, labels).sample, theirs(x, 30, labels).sample)
    close(ours(x, torch.tensor([30.5, 2.0]), class_labels=labels, return_dict=False)[0],
          theirs(x, torch.tensor([30.5, 2.0]), labels).sample)
    assert len(native_calls) == 2


@pytest.mark.parametrize("switch", ["plain", "slicing", "tiling", "both"])
@torch.no_grad()
def test_autoencoder_kl(switch, native_calls):
    ours, theirs = pair(make.vae_kl())
    for vae in (ours, theirs):
        if switch in ("slicing", "both"):
            vae.enable_slicing()
        if switch in ("tiling", "both"):
            vae.enable_tiling()
    x = torch.rand(2, 3, 48, 40) * 2 - 1

    posterior, wanted = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
    close(posterior.parameters, wanted.parameters)
    z = wanted.sample(torch.Generator().manual_seed(0))
    close(posterior.sample(torch.Generator().manual_seed(0)), z)
    close(ours.decode(z).sample, theirs.decode(z).sample)
    close(ours(x).sample, theirs(x).sample)
    assert {"encoder", "decoder"} == set(native_calls)
    ours.disable_tiling()
    theirs.disable_tiling()
    close(ours.decode(z).sample, theirs.decode(z).sample)


@torch.no_grad()
def test_autoencoder_tiny_and_vq(native_calls):
    ours, theirs = pair(make.vae_tiny())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    close(ours.encode(x).latents, theirs.encode(x).latents)
    close(ours.decode(theirs.encode(x).latents).sample, theirs.decode(theirs.encode(x).latents).sample)
    close(ours(x).sample, theirs(x).sample)
    ours, theirs = pair(make.vq())
    latents = theirs.encode(x).latents
    close(ours.encode(x).latents, latents)
    close(ours.decode(latents).sample, theirs.decode(latents).sample)
    close(ours.decode(latents, return_dict=False)[1], theirs.decode(latents, return_dict=False)[1])
    spatial, theirs = pair(make.vq(norm_type="spatial", norm_num_groups=16, block_out_channels=(32, 64)))
    latents = theirs.encode(x).latents
    close(spatial.decode(latents).sample, theirs.decode(latents).sample)
    assert len(native_calls) == 8


def _pipeline():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe, **changes):
    return pipe("a red circle above a blue square", num_inference_steps=4, output_type="np",
                generator=torch.Generator().manual_seed(5), **changes).images


@pytest.mark.filterwarnings("error:ldmfast")
def test_the_shipped_pipeline(native_calls, caplog):
    pipe = _pipeline()
    before = _draw(pipe)
    components = dict(pipe.components)

    with caplog.at_level(logging.INFO, "ldmfast"):
        assert ldmfast.accelerate(pipe) is pipe
    picture = _draw(pipe)

    assert np.abs(picture - before).max() <= 1e-4
    assert native_calls == ["UNet2DConditionModel"] * 4 + ["decoder"]
    assert pipe.components == components and type(pipe.unet) is diffusers.UNet2DConditionModel
    assert pipe.ldmfast_report.accelerated == {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    assert "CLIPTextModel" in pipe.ldmfast_report.left_alone["text_encoder"]
    assert str(pipe.ldmfast_report) in caplog.text

    assert ldmfast.restore(pipe) is pipe
    assert np.array_equal(_draw(pipe), before)  # bit for bit
    assert not hasattr(pipe, "ldmfast_report") and "forward" not in vars(pipe.unet)


def test_image_to_image_shares_the_accelerated_parts(native_calls):
    pipe = _pipeline()
    picture = _draw(pipe)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    before = _draw(other, image=picture, strength=0.6)
    ldmfast.accelerate(pipe)

    assert np.abs(_draw(other, image=picture, strength=0.6) - before).max() <= 1e-4
    assert {"encoder", "decoder", "UNet2DConditionModel"} == set(native_calls)


@pytest.mark.parametrize("precision, limit", [("bf16", 0.02), ("int8", 0.05)])
def test_low_precisions_come_near(precision, limit, native_calls):
    """Mean absolute difference of the picture, against that of another seed's picture."""
    pipe = _pipeline()
    before = _draw(pipe)
    ldmfast.accelerate(pipe, precision=precision)

    picture = _draw(pipe)

    assert picture.dtype == before.dtype and 0 < np.abs(picture - before).mean() < limit
    assert len(native_calls) == 5
    ldmfast.accelerate(pipe)  # another precision replaces this one
    assert np.abs(_draw(pipe) - before).max() <= 1e-4
    ldmfast.restore(pipe)
    assert np.array_equal(_draw(pipe), before)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@torch.no_grad()
def test_conditions_in_low_precision(precision, native_calls):
    """Residuals come in the dtype of diffusers' weights, the network runs in another."""
    theirs = make.unet()
    ours = ldmfast.accelerate(copy.deepcopy(theirs), precision=precision)
    for given in (_residuals(ours), _adapters(ours)):
        out = ours(*inputs(), **copy.deepcopy(given)).sample
        wanted = theirs(*inputs(), **copy.deepcopy(given)).sample
        assert out.dtype == torch.float32 and (out - wanted).std() < 0.1 * wanted.std()
    assert len(native_calls) == 2


def test_what_is_left_alone():
    class Mine(diffusers.UNet2DConditionModel):
        pass

    mine = Mine(**make.unet().config)
    with pytest.warns(UserWarning, match="no native .* Mine"):
        assert ldmfast.accelerate(mine) is mine
    assert mine.ldmfast_report.accelerated == {} and "forward" not in vars(mine)

    strange = make.unet_2d(downsample_type="resnet")
    with pytest.warns(UserWarning, match="downsample_type"):
        ldmfast.accelerate(strange)
    assert "forward" not in vars(strange)

    patched = make.unet()
    patched.forward = lambda *a, **k: None
    with pytest.warns(UserWarning, match="was replaced already"):
        ldmfast.accelerate(patched)
    with pytest.warns(UserWarning, match="torch.compile"):
        ldmfast.accelerate(torch.compile(make.unet()))


def test_bad_arguments():
    with pytest.raises(ldmfast.PrecisionError, match="'fp4'"):
        ldmfast.accelerate(make.unet(), precision="fp4")
    for function in (ldmfast.accelerate, ldmfast.restore):
        with pytest.raises(ldmfast.LdmfastError, match="a dict is neither"):
            function({})


def test_solver_swaps_the_scheduler():
    """The same pipeline with diffusers' scheduler of that class is the oracle."""
    pytest.importorskip("ldmfast.samplers.diffusers_shell", reason="ldmfast.samplers.diffusers_shell is not here yet")
    pipe, theirs = _pipeline(), _pipeline()
    original = pipe.scheduler
    for solver, kind, settings in (
            ("euler", diffusers.EulerDiscreteScheduler, {}),
            ("UniPCMultistepScheduler", diffusers.UniPCMultistepScheduler, {}),
            ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"})):
        ldmfast.accelerate(pipe, solver=solver)
        theirs.scheduler = kind.from_config(original.config, **settings)
        assert isinstance(pipe.scheduler, kind) and type(pipe.scheduler) is not kind
        assert np.abs(_draw(pipe) - _draw(theirs)).max() <= 1e-4
    ldmfast.restore(pipe)
    assert pipe.scheduler is original
    ldmfast.accelerate(pipe, solver="ddim")
    pipe.scheduler = theirs.scheduler
    assert ldmfast.restore(pipe).scheduler is theirs.scheduler
    with pytest.raises(ldmfast.LdmfastError, match="'magic' is unknown"):
        ldmfast.accelerate(pipe, solver="magic")
    with pytest.raises(ldmfast.LdmfastError, match="has no scheduler"):
        ldmfast.accelerate(make.unet(), solver="ddim")
