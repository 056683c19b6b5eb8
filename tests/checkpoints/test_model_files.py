"""One model from a file: its own file or a whole pipeline's, CompVis or diffusers names, against the original."""

from __future__ import annotations

from pathlib import Path

import compvis
import diffusers
import pytest
import safetensors.torch
import torch

from ldmfast.checkpoints import inspect, open_single_file
from ldmfast.errors import CheckpointError
from ldmfast.models import AutoencoderKL, UNet2DCondition

VAE = {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 2,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
UNETS = {
    "sd1": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64, "attention_head_dim": 8},
    "inpainting": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64, "attention_head_dim": 8,
                   "in_channels": 9},
    "sd2": {"block_out_channels": (64, 128, 128, 128), "cross_attention_dim": 96, "attention_head_dim": (1, 2, 2, 2),
            "use_linear_projection": True, "layers_per_block": 1},
    "sdxl": {"block_out_channels": (64, 128, 256), "attention_head_dim": (1, 2, 4), "use_linear_projection": True,
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
             "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 96,
             "transformer_layers_per_block": (1, 2, 3), "addition_embed_type": "text_time", "layers_per_block": 1,
             "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 96 + 6 * 256},
}
PREFIXES = {"unet": ("", "model.diffusion_model."), "vae": ("", "first_stage_model.", "vae.")}


def _save(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".ckpt":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str, layout: str, tmp_path: Path) -> None:
    """The same prediction as the original, in diffusers, to the rounding of fp32; the config may say it otherwise."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**UNETS[name]).eval()
    state = theirs.state_dict()
    if layout == "compvis":
        state = compvis.unet(state, theirs.config.layers_per_block)
    x, text = torch.randn(1, theirs.config.in_channels, 16, 16), torch.randn(1, 7, theirs.config.cross_attention_dim)
    added = ({"text_embeds": torch.randn(1, 96), "time_ids": torch.rand(1, 6)} if name == "sdxl" else None)
    with torch.no_grad():
        expected = theirs(x, 7, text, added_cond_kwargs=added).sample
    for prefix in PREFIXES["unet"]:
        path = _save(compvis.prefixed(prefix, state), tmp_path / f"unet{'.safetensors' if prefix else '.ckpt'}")
        ours = UNet2DCondition.from_single_file(path)
        assert ours.dtype == torch.float32
        assert (ours(x, 7, text, added_cond_kwargs=added) - expected).abs().max() <= 1e-4
        assert [n for n in open_single_file(path).names if n != "scheduler"] == ["unet"]
        assert UNet2DCondition.from_single_file(path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
@pytest.mark.parametrize("quant", [True, False])
def test_vae(layout: str, quant: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(**VAE, use_quant_conv=quant, use_post_quant_conv=quant).eval()
    state = theirs.state_dict() if layout == "diffusers" else compvis.vae(theirs.state_dict(), 4)
    image, z = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = theirs.decode(z).sample, theirs.encode(image).latent_dist.mean
    for prefix in PREFIXES["vae"]:
        path = _save(compvis.prefixed(prefix, state), tmp_path / "vae.safetensors")
        ours = AutoencoderKL.from_single_file(path)
        assert (ours.decode(z) - expected[0]).abs().max() <= 1e-4
        assert (ours.encode(image).mean - expected[1]).abs().max() <= 1e-4
        assert ours.config.scaling_factor == 0.18215 and "AutoencoderKL" in str(inspect(path))


def test_old_names_of_a_diffusers_vae(tmp_path: Path) -> None:
    theirs = diffusers.AutoencoderKL(**VAE)
    state = {}
    for name, tensor in theirs.state_dict().items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        state[name] = tensor
    found = open_single_file(_save(state, tmp_path / "vae.safetensors")).weights("vae")
    own = theirs.state_dict()
    assert found.keys() == own.keys() and all(torch.equal(v, own[k]) for k, v in found.items())


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    vae = diffusers.AutoencoderKL(**VAE).state_dict()
    path = _save(vae, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="holds no UNet2DCondition; it holds vae"):
        UNet2DCondition.from_single_file(path)
    del vae["decoder.conv_out.weight"]
    with pytest.raises(CheckpointError, match=r"tensor 'decoder.conv_out.weight' .* is missing"):
        AutoencoderKL.from_single_file(_save(vae, path))
    vae = diffusers.AutoencoderKL(**VAE).state_dict()
    del vae["decoder.conv_out.bias"]
    with pytest.raises(CheckpointError, match=f"{path}: AutoencoderKL: 1 of .* tensors are missing"):
        AutoencoderKL.from_single_file(_save(vae, path))
    other = {k.replace("down_blocks.0", "down_blocks.0.more"): v for k, v in diffusers.UNet2DConditionModel(
        **UNETS["sd1"]).state_dict().items()}
    with pytest.raises(CheckpointError, match="a whole diffusers model is opened by its folder"):
        UNet2DCondition.from_single_file(_save(other, path))
