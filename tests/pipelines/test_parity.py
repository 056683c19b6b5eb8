"""The pipeline against diffusers on the same weights and seeds, in fp32: pictures in [0, 1] agree to 1e-4."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import torch

import ldmfast

LIMIT = 1e-4  # DESIGN section 6: "exact" is parity with diffusers to 1e-4 max-abs

SOLVERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {"clip_sample": False}),
}


def worst(a, b) -> float:
    return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).max())


def with_scheduler(folder, config: dict):
    native = ldmfast.Pipeline.from_pretrained(folder)
    native.loaded = dataclasses.replace(native.loaded, schedule=ldmfast.samplers.Schedule.from_config(config))
    return native


@pytest.mark.parametrize("solver", SOLVERS)
def test_text_to_image(sd, ours, solver):
    theirs, _ = sd
    cls, extra = SOLVERS[solver]
    before = theirs.scheduler
    theirs.scheduler = cls.from_config(before.config, **extra)
    call = {"prompt": ["a red cat", "two dogs, 4k"], "negative_prompt": ["blurry"] * 2, "num_inference_steps": 6,
            "guidance_scale": 5.0, "output_type": "np", "height": 64, "width": 72}
    expected = theirs(**call, generator=[torch.Generator().manual_seed(s) for s in (5, 6)]).images
    theirs.scheduler = before
    native = with_scheduler(sd[1], {**cls.from_config(before.config, **extra).config, "_class_name": cls.__name__})
    got = native(**call, generator=[5, 6], solver=solver, progress=False).images
    assert expected.std() > 0.05, "a flat picture cannot tell solvers apart"
    assert worst(got, expected) <= LIMIT


def test_defaults_of_a_call(sd, ours):
    """Without arguments beyond the prompt: diffusers' sizes, steps and guidance (the solver is named in DESIGN)."""
    expected = sd[0]("a cat", generator=torch.Generator().manual_seed(3), output_type="np").images
    got = ours("a cat", generator=torch.Generator().manual_seed(3), solver="ddim", output_type="np", progress=False)
    assert worst(got.images, expected) <= LIMIT
    assert got.settings[0]["num_inference_steps"] == 50 and got.settings[0]["guidance_scale"] == 7.5


def test_one_generator_for_a_batch_is_one_stream(sd, ours):
    call = {"prompt": "a cat", "num_images_per_prompt": 2, "num_inference_steps": 3, "output_type": "np"}
    expected = sd[0](**call, generator=torch.Generator().manual_seed(3)).images
    got = ours(**call, generator=torch.Generator().manual_seed(3), solver="ddim", progress=False).images
    assert worst(got, expected) <= LIMIT


@pytest.mark.parametrize("extra", [{"guidance_scale": 1.0}, {"guidance_rescale": 0.7}, {"eta": 0.6}])
def test_call_options(sd, ours, extra):
    call = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "np", **extra}
    expected = sd[0](**call, generator=torch.Generator().manual_seed(9)).images
    got = ours(**call, generator=9, solver="ddim", progress=False).images
    assert worst(got, expected) <= LIMIT


def test_clip_skip(sd, ours):
    """diffusers 0.42 looks for an attribute that transformers 5 dropped, so the hidden layer is taken by hand."""
    theirs = sd[0]
    ids = theirs.tokenizer(["a cat", ""], padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = theirs.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
    embeds = theirs.text_encoder.final_layer_norm(hidden).detach()
    call = {"num_inference_steps": 4, "output_type": "np"}
    expected = theirs(**call, prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:],
                      generator=torch.Generator().manual_seed(9)).images
    got = ours("a cat", **call, clip_skip=1, generator=9, solver="ddim", progress=False).images
    assert worst(got, expected) <= LIMIT


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_image_to_image(sd, ours, picture, strength):
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**sd[0].components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "image": picture, "strength": strength, "num_inference_steps": 5, "output_type": "np"}
    expected = theirs(**call, generator=torch.Generator().manual_seed(1)).images
    got = ours(**call, generator=1, solver="ddim", progress=False).images
    assert worst(got, expected) <= LIMIT


def test_image_to_image_with_an_autoencoder_without_posterior(sd, picture, tmp_path):
    """AutoencoderTiny encodes to latents, not to a distribution (this crashed once), and draws no random numbers."""
    torch.manual_seed(0)
    parts = dict(sd[0].components) | {"vae": diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4).eval()}
    theirs = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    call = {"prompt": "a cat", "image": picture, "strength": 0.6, "num_inference_steps": 5, "output_type": "np"}
    expected = theirs(**call, generator=torch.Generator().manual_seed(1)).images
    got = ldmfast.Pipeline.from_pretrained(tmp_path)(**call, generator=1, solver="ddim", progress=False).images
    assert worst(got, expected) <= LIMIT


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_four_channels(sd, ours, picture, mask, strength):
    theirs = diffusers.StableDiffusionInpaintPipeline(**sd[0].components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    call = {"prompt": "a cat", "image": picture, "mask_image": mask, "strength": strength, "num_inference_steps": 5}
    expected = theirs(**call, height=64, width=64, output_type="np", generator=torch.Generator().manual_seed(1)).images
    got = ours(**call, output_type="np", generator=1, solver="ddim", progress=False).images
    assert worst(got, expected) <= LIMIT


def test_outside_the_mask_the_latents_end_exactly_as_encoded(ours, picture, mask):
    """Bit for bit: encode with the same seed by hand and compare."""
    from ldmfast.pipelines.inputs import prepare_image, prepare_mask

    got = ours("a cat", image=picture, mask_image=mask, num_inference_steps=4, generator=1, output_type="latent",
               progress=False).images
    posterior = ours.vae.encode(prepare_image(picture, 64, 64))
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    source = (posterior.mean + torch.exp(0.5 * posterior.logvar) * noise) * ours.vae.config.scaling_factor
    keep = torch.nn.functional.interpolate(prepare_mask(mask, 64, 64), size=(8, 8)).expand_as(source) == 0
    assert keep.any() and not keep.all()
    assert torch.equal(got[keep], source[keep])
    assert not torch.equal(got[~keep], source[~keep])


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_inpainting_with_nine_channels(inpaint9, picture, mask, strength):
    theirs, folder = inpaint9
    native = ldmfast.Pipeline.from_pretrained(folder)
    call = {"prompt": "a cat", "image": picture, "mask_image": mask, "strength": strength, "num_inference_steps": 4}
    expected = theirs(**call, height=64, width=64, output_type="np", generator=torch.Generator().manual_seed(1)).images
    got = native(**call, output_type="np", generator=1, solver="ddim", progress=False).images
    assert worst(got, expected) <= LIMIT


@pytest.mark.parametrize("negative", [None, "blurry"])
def test_sdxl(sdxl, negative):
    theirs, folder = sdxl
    native = ldmfast.Pipeline.from_pretrained(folder)
    call = {"prompt": "a cat", "negative_prompt": negative, "num_inference_steps": 4, "height": 64, "width": 64,
            "original_size": (128, 96), "crops_coords_top_left": (8, 0)}
    expected = theirs(**call, output_type="np", generator=torch.Generator().manual_seed(1)).images
    got = native(**call, output_type="np", generator=1, solver="euler", progress=False).images
    assert worst(got, expected) <= LIMIT


def test_v_prediction_with_zero_terminal_snr(sd):
    """SD 2's v-prediction, trailing spacing and rescaled betas, guidance rescaled."""
    theirs, folder = sd
    config = dict(theirs.scheduler.config) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                                              "timestep_spacing": "trailing"}
    before, theirs.scheduler = theirs.scheduler, diffusers.DDIMScheduler.from_config(config)
    call = {"prompt": "a cat", "num_inference_steps": 5, "guidance_rescale": 0.5, "output_type": "np"}
    expected = theirs(**call, generator=torch.Generator().manual_seed(2)).images
    theirs.scheduler = before
    native = with_scheduler(folder, {**config, "_class_name": "DDIMScheduler"})
    assert worst(native(**call, generator=2, solver="ddim", progress=False).images, expected) <= LIMIT


def test_bf16_stays_near_fp32(ours, sd):
    """bf16 is as near to fp32 as diffusers' own bf16 is, times two."""
    call = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "np", "guidance_scale": 3.0}
    exact = ours(**call, generator=4, solver="ddim", progress=False).images
    low = ldmfast.Pipeline.from_pretrained(sd[1], precision="bf16")
    ours_error = np.abs(low(**call, generator=4, solver="ddim", progress=False).images - exact).mean()
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(sd[1], dtype=torch.bfloat16)
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    expected = theirs(**call, latents=noise.to(torch.bfloat16)).images
    assert 0 < ours_error <= 2 * np.abs(expected - exact).mean()


def test_text_encoders_of_other_classes(sdxl):
    """A text encoder that is not ours, put in by hand, is called with transformers' arguments (SDXL uses them all)."""
    theirs, folder = sdxl
    native = ldmfast.Pipeline.from_pretrained(folder)
    call = {"prompt": ["a cat", "two dogs"], "negative_prompt": "blurry", "num_inference_steps": 2, "output_type": "np",
            "height": 64, "width": 64, "generator": 1, "progress": False}
    expected = native(**call).images
    models = (theirs.text_encoder, theirs.text_encoder_2)
    encoders = tuple(dataclasses.replace(e, model=m) for e, m in zip(native.loaded.text_encoders, models))
    native.loaded = dataclasses.replace(native.loaded, text_encoders=encoders)
    got = native(**call).images
    assert 0 < worst(got, expected) <= LIMIT
