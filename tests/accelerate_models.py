"""Small diffusers models with random weights, and inputs for them."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

_UNET = dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
             cross_attention_dim=24, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
_VAE = dict(sample_size=32, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)


def _seeded(kind, **config):
    torch.manual_seed(0)
    model = kind(**config).eval()
    with torch.no_grad():
        for p in model.parameters():  # diffusers starts some layers at zero, which would hide what is behind them
            p.add_(0.02 * torch.randn_like(p))
    return model


def unet(**changes) -> UNet2DConditionModel:
    return _seeded(UNet2DConditionModel, **_UNET | changes)


def unet_2d(**changes) -> UNet2DModel:
    return _seeded(UNet2DModel, **dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1,
                                       norm_num_groups=8, attention_head_dim=8,
                                       down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                       up_block_types=("AttnUpBlock2D", "UpBlock2D")) | changes)


def controlnet(**changes) -> ControlNetModel:
    keys = {k: v for k, v in _UNET.items() if k not in ("sample_size", "up_block_types")}
    return _seeded(ControlNetModel, **keys | dict(conditioning_embedding_out_channels=(8, 16)) | changes)


def vae_kl(**changes) -> AutoencoderKL:
    return _seeded(AutoencoderKL, **_VAE | changes)


def vae_tiny(**changes) -> AutoencoderTiny:
    return _seeded(AutoencoderTiny, **dict(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4,
                                           num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1)) | changes)


def vq(**changes) -> VQModel:
    return _seeded(VQModel, **_VAE | dict(num_vq_embeddings=32) | changes)


def sd3(**changes) -> SD3Transformer2DModel:
    return _seeded(SD3Transformer2DModel, **dict(
        sample_size=16, num_layers=3, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=24,
        caption_projection_dim=64, pooled_projection_dim=20, pos_embed_max_size=12, in_channels=4, out_channels=4,
        qk_norm="rms_norm", dual_attention_layers=(0,)) | changes)


def flux(**changes) -> FluxTransformer2DModel:
    return _seeded(FluxTransformer2DModel, **dict(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 6, 6), guidance_embeds=True) | changes)


def joint_inputs(model, batch: int = 2, seed: int = 1) -> dict:
    """The arguments of an SD3 or FLUX transformer, by name."""
    g = torch.Generator().manual_seed(seed)
    given = {"encoder_hidden_states": torch.randn(batch, 7, 24, generator=g),
             "pooled_projections": torch.randn(batch, 20, generator=g)}
    if isinstance(model, SD3Transformer2DModel):
        return given | {"hidden_states": torch.randn(batch, 4, 14, 12, generator=g),
                        "timestep": torch.tensor([501] * batch)}
    ids = torch.stack([torch.zeros(20), torch.arange(20) // 5, torch.arange(20) % 5], dim=-1)
    return given | {"hidden_states": torch.randn(batch, 20, 16, generator=g), "timestep": torch.full((batch,), 0.5),
                    "guidance": torch.full((batch,), 3.5), "img_ids": ids, "txt_ids": torch.zeros(7, 3)}


def dit(**changes) -> DiTTransformer2DModel:
    return _seeded(DiTTransformer2DModel, **dict(num_attention_heads=2, attention_head_dim=16, num_layers=2,
                                                 sample_size=8, num_embeds_ada_norm=10, out_channels=8) | changes)


def pixart(**changes) -> PixArtTransformer2DModel:
    return _seeded(PixArtTransformer2DModel, **dict(num_attention_heads=2, attention_head_dim=24, num_layers=2,
                                                    sample_size=16, cross_attention_dim=48, caption_channels=24)
                   | changes)


def inputs(batch: int = 2, size: int = 16, dim: int = 24, tokens: int = 7, seed: int = 1):
    """sample, timestep, encoder_hidden_states"""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, 4, size, size, generator=g), torch.tensor(501),
            torch.randn(batch, tokens, dim, generator=g))
