"""A whole pipeline from one CompVis-layout file, against diffusers with the same weights; no network, no configs."""

from __future__ import annotations

import compvis
import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from pipeline_cases import SD_SCHEDULE
from small_parts import TOKENIZER, randomise

import ldmfast


def text_encoder(width: int, layers: int, act: str, projection: int | None = None, seed: int = 3):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                            num_attention_heads=width // 64, vocab_size=49408, projection_dim=projection or width,
                            hidden_act=act)
    model = (CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config).eval()
    randomise(model, seed)
    return model


def networks(unet_config: dict):
    vae = diffusers.AutoencoderKL(block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=4,
                                  down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4).eval()
    unet = diffusers.UNet2DConditionModel(**unet_config).eval()
    randomise(vae, 1)
    randomise(unet, 2)
    return unet, vae


def compvis_file(path, unet, vae, texts: dict[str, dict]) -> None:
    layers = unet.config.layers_per_block
    tensors = compvis.prefixed("model.diffusion_model.", compvis.unet(unet.state_dict(), layers))
    tensors |= compvis.prefixed("first_stage_model.", compvis.vae(vae.state_dict(), 4))
    for prefix, state in texts.items():
        tensors |= compvis.prefixed(prefix, state)
    safetensors.torch.save_file({k: v.clone() for k, v in tensors.items()}, path)


def agree(theirs, native, solver: str, **call) -> None:
    theirs.set_progress_bar_config(disable=True)
    call = {"prompt": "a red cat, oil", "num_inference_steps": 4, "height": 64, "width": 64, "output_type": "np",
            **call}
    expected = theirs(**call, generator=torch.Generator().manual_seed(1)).images
    got = native(**call, generator=1, solver=solver, progress=False).images
    assert expected.std() > 0.02
    assert np.abs(got - expected).max() <= 1e-4


def test_sd1(tmp_path):
    from transformers import CLIPTokenizer

    unet, vae = networks({"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64, "attention_head_dim": 8})
    text = text_encoder(64, 2, "quick_gelu")
    file = tmp_path / "model.safetensors"
    compvis_file(file, unet, vae, {"cond_stage_model.transformer.": compvis.wrapped(text.state_dict())})
    theirs = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER), unet=unet,
        scheduler=diffusers.DDIMScheduler(**SD_SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    agree(theirs, ldmfast.Pipeline.from_single_file(file), "ddim")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sd2(tmp_path, prediction):
    """open_clip's text encoder, used up to its last layer but one; padded with "!" as SD 2 is."""
    from transformers import CLIPTokenizer

    unet, vae = networks({"block_out_channels": (64, 128, 128, 128), "cross_attention_dim": 64, "layers_per_block": 1,
                          "attention_head_dim": (1, 2, 2, 2), "use_linear_projection": True})
    text = text_encoder(64, 2, "gelu")
    file = tmp_path / "model.safetensors"
    compvis_file(file, unet, vae, {"cond_stage_model.model.": compvis.open_clip(compvis.wrapped(text.state_dict()))})
    theirs = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER, pad_token="!"), unet=unet,
        scheduler=diffusers.DDIMScheduler(**SD_SCHEDULE, clip_sample=False, set_alpha_to_one=False,
                                          prediction_type=prediction),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    agree(theirs, ldmfast.Pipeline.from_single_file(file, prediction_type=prediction), "ddim")


def test_sdxl(tmp_path):
    from transformers import CLIPTokenizer

    unet, vae = networks({
        "block_out_channels": (64, 128, 256), "attention_head_dim": (1, 2, 4), "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 2), "addition_embed_type": "text_time", "cross_attention_dim": 192,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 128})
    vae.register_to_config(scaling_factor=0.13025)
    first, second = text_encoder(64, 2, "quick_gelu"), text_encoder(128, 2, "gelu", projection=128, seed=5)
    file = tmp_path / "model.safetensors"
    compvis_file(file, unet, vae, {
        "conditioner.embedders.0.transformer.": compvis.wrapped(first.state_dict()),
        "conditioner.embedders.1.model.": compvis.open_clip(compvis.wrapped(second.state_dict()))})
    theirs = diffusers.StableDiffusionXLPipeline(
        vae=vae, text_encoder=first, tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER), text_encoder_2=second,
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER, pad_token="!"), unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**SD_SCHEDULE, timestep_spacing="leading"), add_watermarker=False)
    agree(theirs, ldmfast.Pipeline.from_single_file(file), "euler")
