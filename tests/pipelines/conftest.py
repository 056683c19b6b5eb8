"""Small diffusers pipelines with random weights, saved as ordinary folders: what ldmfast loads and is compared with."""

from __future__ import annotations

import pytest
import torch
from small_parts import TOKENIZER, randomise, text, vae

import ldmfast


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


@pytest.fixture(scope="session")
def sd(tmp_path_factory):
    """(diffusers pipeline, folder) of a reduced SD 1."""
    pipe, folder = make_sd(), tmp_path_factory.mktemp("sd")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


@pytest.fixture(scope="session")
def inpaint9(tmp_path_factory):
    pipe, folder = make_sd(9), tmp_path_factory.mktemp("inpaint9")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    pipe, folder = make_sdxl(), tmp_path_factory.mktemp("sdxl")
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folder


@pytest.fixture(scope="session")
def ours(sd):
    """The reduced SD 1 in ldmfast."""
    return ldmfast.Pipeline.from_pretrained(sd[1])


@pytest.fixture(scope="session")
def picture():
    from PIL import Image

    return Image.radial_gradient("L").resize((64, 64)).convert("RGB")


@pytest.fixture(scope="session")
def mask():
    from PIL import Image

    m = Image.new("L", (64, 64), 0)
    m.paste(255, (16, 8, 56, 40))
    return m
