"""Few-step models in the pipeline: diffusers' pictures, one forward a step, and a start from a degraded picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipeline_cases import SD_SCHEDULE, _unet, make_sd

import ldmfast
from ldmfast.samplers import Schedule, make_table

PROMPT = "a red circle above a blue square"


def evaluations(pipe: ldmfast.Pipeline, monkeypatch) -> list[int]:
    """Pictures in every forward of the network, as they are made."""
    rows: list[int] = []
    forward = type(pipe.unet).forward

    def counted(self, sample, *args, **kwargs):
        rows.append(len(sample))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(pipe.unet), "forward", counted)
    return rows


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """(diffusers' LatentConsistencyModelPipeline, ours): a network that is told the guidance scale."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    parts = make_sd().components
    parts |= {"unet": _unet(4, time_cond_proj_dim=16), "scheduler": LCMScheduler(**SD_SCHEDULE)}
    pipe = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    folder = tmp_path_factory.mktemp("lcm")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, ldmfast.Pipeline.from_pretrained(folder)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0, "num_inference_steps": 3},
                                      {"timesteps": [999, 700, 350, 100]}], ids=str)
def test_guidance_embedding_equals_diffusers(embedded, settings, monkeypatch) -> None:
    """The folder as it is: LCM's solver, 4 steps, guidance 8.5 by embedding, one forward a picture and step."""
    theirs, ours = embedded
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    want = theirs([PROMPT] * 2, latents=latents, generator=torch.Generator().manual_seed(5), output_type="latent",
                  **settings).images
    rows = evaluations(ours, monkeypatch)
    got = ours([PROMPT] * 2, latents=latents, generator=torch.Generator().manual_seed(5), output_type="latent",
               progress=False, **settings).images
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert sum(rows) == 2 * len(settings.get("timesteps", range(settings.get("num_inference_steps", 4))))


def test_the_embedded_scale_matters(embedded) -> None:
    a, b = (embedded[1](PROMPT, generator=1, guidance_scale=scale, output_type="pt", progress=False).images
            for scale in (1.0, 8.5))
    assert (a - b).abs().max() > 1e-3


# diffusers' scheduler, its settings, ours, and what both calls are given
FEW = {
    "lcm-lora": ("LCMScheduler", {}, "lcm", {"num_inference_steps": 4, "guidance_scale": 1.0}),
    "tcd": ("TCDScheduler", {}, "tcd", {"num_inference_steps": 4, "guidance_scale": 0.0, "eta": 0.3}),
    "pcm": ("TCDScheduler", {}, "tcd", {"num_inference_steps": 4, "guidance_scale": 0.0}),
    "hyper-sd": ("DDIMScheduler", {"timestep_spacing": "trailing"}, "ddim",
                 {"num_inference_steps": 2, "guidance_scale": 0.0}),
    "turbo": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler_a",
              {"num_inference_steps": 4, "guidance_scale": 0.0}),
    "lightning": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler",
                  {"num_inference_steps": 4, "guidance_scale": 0.0}),
    "one-step": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "prediction_type": "sample"}, "euler",
                 {"num_inference_steps": 1, "guidance_scale": 0.0}),
    "dmd2": ("LCMScheduler", {}, "lcm", {"timesteps": [999, 749, 499, 249], "guidance_scale": 0.0}),
}


@pytest.mark.parametrize("kind", FEW)
def test_unguided_steps_are_diffusers_and_one_forward_each(sd, kind, tmp_path, monkeypatch) -> None:
    """One forward where classifier-free guidance needs two."""
    import diffusers

    name, config, solver, call = FEW[kind]
    theirs = type(sd[0])(**sd[0].components, requires_safety_checker=False)
    theirs.scheduler = getattr(diffusers, name).from_config(sd[0].scheduler.config, **config)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    ours = ldmfast.Pipeline.from_pretrained(tmp_path)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    want = theirs([PROMPT] * 2, latents=latents, generator=torch.Generator().manual_seed(5), output_type="latent",
                  **call).images
    rows = evaluations(ours, monkeypatch)
    ours_call = {"latents": latents, "solver": solver, "output_type": "latent", "progress": False, **call}
    got = ours([PROMPT] * 2, generator=torch.Generator().manual_seed(5), **ours_call).images
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    steps = len(call["timesteps"]) if "timesteps" in call else call["num_inference_steps"]
    assert sum(rows) == 2 * steps
    rows.clear()
    ours([PROMPT] * 2, generator=5, **ours_call | {"guidance_scale": 3.0})
    assert sum(rows) == 4 * steps


@pytest.mark.parametrize("strength,run", [(0.75, 3), (0.5, 2), (1.0, 4)])
def test_start_from_a_degraded_picture(ours, picture, strength, run) -> None:
    """InterLCM: the picture is the state at a middle step of LCM's list, and the rest of the list runs. Oracle: the
    loop of Luo et al. 2023, algorithm 3, written out."""
    seen: list[torch.Tensor] = []

    def keep(call, step, t, tensors):
        seen.append(tensors["latents"])

    got = ours(PROMPT, image=picture, strength=strength, solver="lcm", num_inference_steps=4, guidance_scale=1.0,
               generator=torch.Generator().manual_seed(4), callback_on_step_end=keep, output_type="latent",
               progress=False).images
    assert len(seen) == run
    generator = torch.Generator().manual_seed(4)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    source = ours.vae.encode(pixels).sample(generator) * ours.vae.config.scaling_factor
    tokenizer = ours.components["tokenizer"]
    length = tokenizer.model_max_length
    ids = tokenizer([PROMPT], padding="max_length", max_length=length, return_tensors="pt").input_ids
    states = ours.components["text_encoder"](ids)[0]
    abar = torch.from_numpy(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)).float()
    x = None
    with torch.inference_mode():
        for i, t in enumerate([999, 759, 499, 259][4 - run:]):
            noise = torch.randn(source.shape, generator=generator)
            clean = source if i == 0 else x
            x = abar[t].sqrt() * clean + (1 - abar[t]).sqrt() * noise
            eps = ours.unet(x, float(t), states)
            x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
            scaled = 10.0 * t
            x = 0.25 / (scaled**2 + 0.25) * x + scaled / (scaled**2 + 0.25) ** 0.5 * x0
    assert (got - x).abs().max() <= 1e-4 * x.abs().max()


def test_tables_of_the_shipped_schedule_are_the_ones_it_was_distilled_for() -> None:
    schedule = Schedule(prediction_type="v_prediction")
    for solver in ("lcm", "tcd"):
        assert make_table(schedule, solver, 4).network_times.tolist() == [999, 759, 499, 259]
