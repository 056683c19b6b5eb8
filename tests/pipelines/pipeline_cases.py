"""Makers of small diffusers pipelines with random weights, for conftest.py and for tests that need their parts."""

from __future__ import annotations

import torch
from small_parts import TOKENIZER, randomise, text, vae


def _unet(in_channels: int, **extra):
    from diffusers import UNet2DConditionModel

    settings = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "in_channels": in_channels,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32,
                "attention_head_dim": 4, "norm_num_groups": 8}
    unet = UNet2DConditionModel(**{**settings, **extra}).eval()
    randomise(unet, 1)
    with torch.no_grad():  # keep predictions near unit size, as a trained network's are
        unet.conv_out.weight.mul_(0.3)
    return unet


SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def make_sd(in_channels: int = 4, **schedule):
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    cls = StableDiffusionInpaintPipeline if in_channels == 9 else StableDiffusionPipeline
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **{**SD_SCHEDULE, **schedule})
    return cls(vae=vae(2), text_encoder=text(32, 2, False, 3), tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
               unet=_unet(in_channels), scheduler=scheduler, safety_checker=None, feature_extractor=None,
               requires_safety_checker=False)


def make_sdxl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    unet = _unet(4, cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
                 projection_class_embeddings_input_dim=6 * 8 + 32, transformer_layers_per_block=(1, 2),
                 use_linear_projection=True, attention_head_dim=(2, 4),
                 down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                 up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    second = CLIPTokenizer.from_pretrained(TOKENIZER, pad_token="!")
    return StableDiffusionXLPipeline(vae=vae(2), text_encoder=text(32, 2, False, 3), tokenizer=tokenizer,
                                     text_encoder_2=text(32, 3, True, 4), tokenizer_2=second, unet=unet,
                                     scheduler=EulerDiscreteScheduler(**SD_SCHEDULE), add_watermarker=False)
