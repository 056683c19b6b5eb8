"""Reduced-width variants of every UNet and autoencoder config, and random weights that make every path matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from torch import Tensor, nn

Conditions = dict[str, Any]


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters random: matrices keep the variance of their input, norms are around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise * p[0].numel() ** -0.5)
            else:
                p.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return module.eval().requires_grad_(False)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class UNetCase:
    """A diffusers UNet config and a function that draws the conditions for a batch size."""

    config: dict[str, Any]
    conditions: Callable[[int], Conditions] = field(default=lambda n: {})
    kind: str = "UNet2DConditionModel"
    sizes: tuple[tuple[int, int], ...] = ((16, 16), (13, 17))

    def build(self, seed: int = 0) -> nn.Module:
        module = randomise(getattr(diffusers, self.kind)(**self.config), seed)
        for part in module.modules():
            if isinstance(part, DualTransformer2DModel):
                # diffusers 0.42 passes it a mask that its signature lacks, and that it would not use
                part.forward = _without_mask(part.forward)
        return module

    def sample(self, n: int, size: tuple[int, int] = (16, 16)) -> Tensor:
        return draw(n, self.config.get("in_channels", 4 if "Condition" in self.kind else 3), *size, seed=3)


def prompt(n: int, tokens: int = 11, dim: int = 48) -> Conditions:
    return {"encoder_hidden_states": draw(n, tokens, dim, seed=2)}


def sdxl(n: int, ids: int = 6) -> Conditions:
    return prompt(n) | {"added_cond_kwargs": {
        "text_embeds": draw(n, 20, seed=4), "time_ids": draw(n, ids, seed=5).abs() * 500}}


def labelled(make: Callable[[int], Tensor]) -> Callable[[int], Conditions]:
    return lambda n: prompt(n) | {"class_labels": make(n)}


def _without_mask(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, encoder_attention_mask=None, **kwargs: forward(*args, **kwargs)


SD1 = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 48, "norm_num_groups": 8,
       "attention_head_dim": 4, "layers_per_block": 2}
SMALL = SD1 | {"block_out_channels": (32, 64), "layers_per_block": 1,
               "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
               "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
SD2 = SD1 | {"attention_head_dim": (2, 4, 8, 8), "use_linear_projection": True, "upcast_attention": True}
SDXL = {"block_out_channels": (32, 64, 96), "cross_attention_dim": 48, "norm_num_groups": 8,
        "attention_head_dim": (2, 4, 6), "use_linear_projection": True, "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 20 + 6 * 8}
REFINER = SDXL | {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": (2, 4, 4, 4),
                  "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
                                       "DownBlock2D"),
                  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                  "transformer_layers_per_block": 2, "projection_class_embeddings_input_dim": 20 + 5 * 8}
LDM = {"block_out_channels": (32, 64, 96), "norm_num_groups": 8, "attention_head_dim": 16, "layers_per_block": 2,
       "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
       "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")}

UNETS: dict[str, UNetCase] = {
    "sd1": UNetCase(SD1, prompt),
    "sd2": UNetCase(SD2, prompt),
    "sdxl": UNetCase(SDXL, sdxl),
    "sdxl_refiner": UNetCase(REFINER, lambda n: sdxl(n, 5)),
    "sdxl_nested_depths": UNetCase(SDXL | {
        "transformer_layers_per_block": ((1, 1), (2, 1), (1, 3)),
        "reverse_transformer_layers_per_block": ((1, 2, 3), (2, 1, 1), (1, 1, 1))}, sdxl),
    "inpainting_9": UNetCase(SD1 | {"in_channels": 9}, prompt),
    "pix2pix_8": UNetCase(SD1 | {"in_channels": 8}, prompt),
    "classes": UNetCase(SMALL | {"num_class_embeds": 7}, labelled(lambda n: torch.arange(n) % 7)),
    "class_timestep": UNetCase(SMALL | {"class_embed_type": "timestep"},
                               labelled(lambda n: torch.arange(n) * 30 + 5)),
    "class_identity": UNetCase(SMALL | {"class_embed_type": "identity"},
                               labelled(lambda n: draw(n, 128, seed=6))),
    "class_projection": UNetCase(
        SMALL | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 24},
        labelled(lambda n: draw(n, 24, seed=6))),
    "class_simple_projection": UNetCase(
        SMALL | {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 24},
        labelled(lambda n: draw(n, 24, seed=6))),
    "class_concat": UNetCase(SMALL | {"num_class_embeds": 7, "class_embeddings_concat": True},
                             labelled(lambda n: torch.arange(n) % 7)),
    "lcm": UNetCase(SMALL | {"time_cond_proj_dim": 16},
                    lambda n: prompt(n) | {"timestep_cond": draw(n, 16, seed=7)}),
    "only_cross_attention": UNetCase(SMALL | {"only_cross_attention": (True, False)}, prompt),
    "dual_cross_attention": UNetCase(SMALL | {"dual_cross_attention": True}, lambda n: prompt(n, 77 + 257)),
    "scale_shift": UNetCase(SMALL | {"resnet_time_scale_shift": "scale_shift"}, prompt),
    "no_middle": UNetCase(SMALL | {"mid_block_type": None}, prompt),
    "plain_middle": UNetCase(SMALL | {"mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1.4}, prompt),
    "scaled_middle": UNetCase(SMALL | {"mid_block_scale_factor": 0.7}, prompt),
    "attention_blocks": UNetCase(
        SD1 | {"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
               "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D"),
               "attention_head_dim": (4, 8, 16, 32)}, prompt, sizes=((16, 16), (24, 8))),
    "per_level_lists": UNetCase(
        SD1 | {"layers_per_block": (1, 2, 1, 2), "cross_attention_dim": (48, 48, 48, 48),
               "attention_head_dim": (2, 4, 8, 4)}, prompt),
    "text_projection": UNetCase(SMALL | {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"},
                                lambda n: prompt(n, dim=20)),
    "odd_kernels": UNetCase(SMALL | {"conv_in_kernel": 1, "conv_out_kernel": 5, "center_input_sample": True,
                                     "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0}, prompt),
    "time_activations": UNetCase(SMALL | {"time_embedding_act_fn": "gelu", "timestep_post_act": "silu",
                                          "time_embedding_dim": 80}, prompt),
    "ldm_unconditional": UNetCase(LDM, kind="UNet2DModel", sizes=((16, 16), (8, 24))),
    "ldm_one_head": UNetCase(LDM | {"attention_head_dim": None, "attn_norm_num_groups": 4,
                                    "mid_block_scale_factor": 1.3}, kind="UNet2DModel", sizes=((16, 16),)),
    "ldm_no_attention": UNetCase(LDM | {"add_attention": False, "num_class_embeds": 5},
                                 lambda n: {"class_labels": torch.arange(n) % 5}, "UNet2DModel", ((16, 16),)),
    "ldm_class_timestep": UNetCase(LDM | {"class_embed_type": "timestep", "downsample_padding": 0},
                                   lambda n: {"class_labels": torch.arange(n) * 9}, "UNet2DModel", ((16, 16),)),
    "ldm_scale_shift": UNetCase(LDM | {"resnet_time_scale_shift": "scale_shift", "mid_block_type": None},
                                kind="UNet2DModel", sizes=((16, 16),)),
}

_LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
           "block_out_channels": (16, 32, 32), "norm_num_groups": 8, "layers_per_block": 2}

KLS: dict[str, dict[str, Any]] = {
    "sd": _LEVELS,
    "four_levels": _LEVELS | {"down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 1,
                              "up_block_types": ("UpDecoderBlock2D",) * 4,
                              "block_out_channels": (16, 16, 32, 32)},
    "no_quant_convs": _LEVELS | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16,
                                 "shift_factor": 0.1},
    "no_middle_attention": _LEVELS | {"mid_block_add_attention": False, "force_upcast": False},
    "attention_levels": _LEVELS | {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
}

VQS: dict[str, dict[str, Any]] = {
    "group": _LEVELS | {"num_vq_embeddings": 64},
    "embed_dim": _LEVELS | {"num_vq_embeddings": 64, "vq_embed_dim": 5, "latent_channels": 4},
    "spatial": _LEVELS | {"block_out_channels": (32, 32, 64), "norm_num_groups": 32, "latent_channels": 4,
                          "norm_type": "spatial", "num_vq_embeddings": 64},
    "spatial_no_attention": _LEVELS | {"block_out_channels": (32, 32, 64), "norm_num_groups": 32,
                                       "norm_type": "spatial", "mid_block_add_attention": False},
    "attention_levels": _LEVELS | {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D")},
}

_TINY = {"encoder_block_out_channels": (16,) * 3, "decoder_block_out_channels": (16,) * 3,
         "num_encoder_blocks": (1, 2, 1), "num_decoder_blocks": (2, 1, 1)}
TINIES: dict[str, dict[str, Any]] = {
    "taesd": _TINY, "sixteen_channels": _TINY | {"latent_channels": 16, "act_fn": "gelu"},
    "bilinear": _TINY | {"upsample_fn": "bilinear", "upsampling_scaling_factor": 3},
}


def diffusers_out(module: nn.Module, sample: Tensor, timestep: Any, **conditions: Any) -> Tensor:
    with torch.no_grad():
        return module(sample, timestep, **conditions).sample


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the RMS of the reference."""
    if theirs.numel() == 0:
        return 0.0 if ours.shape == theirs.shape else float("inf")
    return ((ours.double() - theirs.double()).abs().max() / theirs.double().square().mean().sqrt()).item()


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
