"""The networks of bench/gpu_e2e.py and bench/step_profile.py: SD 1.5 and SDXL with random weights, made on the device,
as diffusers' modules and as ldmfast's pipeline on the same numbers; and a small one for dry runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ldmfast
from ldmfast.pipelines.load import Components
from ldmfast.samplers import Schedule

# as diffusers' Stable Diffusion pipelines have it
SCHEDULE = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
            "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False}
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
SMALL = {**SDXL, "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": (1, 2), "norm_num_groups": 8,
         "block_out_channels": (16, 32), "transformer_layers_per_block": (1, 1), "layers_per_block": 1,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "addition_time_embed_dim": 8,
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "projection_class_embeddings_input_dim": 64}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
SMALL_VAE = {**VAE, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}


@dataclass(frozen=True)
class Model:
    """size: pixels a side. An empty unet means the model that ships with ldmfast."""

    name: str
    size: int
    unet: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)

    @property
    def large(self) -> bool:
        return "addition_embed_type" in self.unet


MODELS = {m.name: m for m in (Model("tiny", 64), Model("small", 64, SMALL, SMALL_VAE), Model("sd15", 512, SD15, VAE),
                              Model("sdxl", 1024, SDXL, {**VAE, "sample_size": 1024, "scaling_factor": 0.13025}))}


def random_module(cls: Any, config: dict[str, Any], dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """A module with normal weights of unit gain, drawn on the device."""
    with torch.device("meta"):
        module = cls(**config)
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    noise = torch.Generator(device).manual_seed(seed)
    for name, p in module.named_parameters():
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5, generator=noise)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
    return module


def modules(model: Model, dtype: torch.dtype, device: str) -> tuple[Any, Any]:
    """diffusers' UNet and autoencoder. force_upcast is off, as in the SDXL autoencoders that people use in fp16."""
    import diffusers

    return (random_module(diffusers.UNet2DConditionModel, model.unet, dtype, device),
            random_module(diffusers.AutoencoderKL, {**model.vae, "force_upcast": False}, dtype, device, 1))


def pipeline(model: Model, dtype: torch.dtype, device: str, given: tuple[Any, Any] | None = None,
             eight: str | None = None) -> ldmfast.Pipeline:
    """ldmfast's pipeline on those modules' numbers, packed as loading packs them; without text encoders. eight: "fp8"
    or "int8" for the UNet's linears, all else in bf16."""
    where = torch.device(device)
    name = {torch.float32: "exact", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    if not model.unet:
        return ldmfast.Pipeline.tiny(dtype=dtype, device=device)
    unet, vae = given or modules(model, dtype, device)
    rest = torch.bfloat16 if eight else dtype
    parts = [ldmfast.models.from_diffusers(unet, dtype=rest, precision=eight or "exact"),
             ldmfast.models.from_diffusers(vae, dtype=rest)]
    loaded = Components(*parts, (), Schedule.from_config(SCHEDULE), SCHEDULE)
    return ldmfast.Pipeline(loaded, precision=eight or name, device=where, source=f"random {model.name}")


def embeddings(model: Model, dtype: torch.dtype, device: str, pictures: int = 1) -> dict[str, Tensor]:
    """Prompt and negative prompt, by the names that diffusers and ldmfast share."""
    noise = torch.Generator(device).manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, device=device).to(dtype)

    width = model.unet["cross_attention_dim"]
    found = {"prompt_embeds": draw(pictures, 77, width), "negative_prompt_embeds": draw(pictures, 77, width)}
    if model.large:
        pooled = model.unet["projection_class_embeddings_input_dim"] - 6 * model.unet["addition_time_embed_dim"]
        found |= {f"{word}pooled_prompt_embeds": draw(pictures, pooled) for word in ("", "negative_")}
    return found


def denoiser(model: Model, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """One evaluation of ldmfast's UNet on two branches (guidance), prompts and times prepared."""
    pipe = pipeline(model, dtype, device)
    config, noise = pipe.unet.config, torch.Generator(device).manual_seed(3)
    sides = model.size // pipe.vae_scale_factor

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise, device=device).to(pipe.unet.dtype)

    x = draw(2, config.in_channels, sides, sides)
    added = None
    if model.large:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": draw(2, pooled), "time_ids": draw(2, 6)}
    with torch.inference_mode():
        state = pipe.unet.prepare([500.0], draw(2, 77, config.cross_attention_dim), added_cond_kwargs=added)

    def step() -> Tensor:
        with torch.inference_mode():
            return pipe.unet(x, 500.0, state=state)

    return step
