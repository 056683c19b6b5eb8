"""Native networks with diffusers' parameter names: one architecture a file, ``layers`` holds what they
share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError, PrecisionError
from .autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Posterior
from .autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from .base import Config, Model
from .clip_text import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from .dit import DiT, DiTConfig
from .flux import FluxTransformer2D, FluxTransformer2DConfig
from .joint_blocks import JointState
from .pixart import PixArt, PixArtConfig
from .rowwise import plan_for
from .sd3 import SD3Transformer2D, SD3Transformer2DConfig
from .transformer_blocks import TransformerState
from .unet_2d import UNet2D
from .unet_2d_condition import UNet2DCondition
from .unet_config import UNet2DConditionConfig, UNet2DConfig
from .unet_state import UNetState
from .vq_model import VQModel, VQModelConfig

# diffusers' _class_name -> (config, module)
REGISTRY: dict[str, tuple[type[Config], type[Model]]] = {
    "UNet2DConditionModel": (UNet2DConditionConfig, UNet2DCondition),
    "UNet2DModel": (UNet2DConfig, UNet2D),
    "AutoencoderKL": (AutoencoderKLConfig, AutoencoderKL),
    "AutoencoderTiny": (AutoencoderTinyConfig, AutoencoderTiny),
    "VQModel": (VQModelConfig, VQModel),
    "DiTTransformer2DModel": (DiTConfig, DiT),
    "PixArtTransformer2DModel": (PixArtConfig, PixArt),
    "SD3Transformer2DModel": (SD3Transformer2DConfig, SD3Transformer2D),
    "FluxTransformer2DModel": (FluxTransformer2DConfig, FluxTransformer2D),
}
# the same for transformers' text encoders
TEXT_ENCODERS: dict[str, tuple[type[Config], type[Model]]] = {
    "CLIPTextModel": (CLIPTextConfig, CLIPTextModel),
    "CLIPTextModelWithProjection": (CLIPTextConfig, CLIPTextModelWithProjection),
}


def from_diffusers(module: nn.Module, dtype: torch.dtype | None = None, precision: str = "exact") -> Model:
    """The native model of a diffusers model, or of transformers' text encoder, sharing the storage of its parameters.

    module: an instance of a class named in REGISTRY or TEXT_ENCODERS, or of a subclass. dtype: converts (and so copies)
    the weights. precision: "exact" (the weights' own dtype), "bf16", "int8" (W8A8 products, the rest in bf16; a
    linear or convolution is left in bf16 where ``quantization.can_be_int8`` says so; on a GPU linears only), or "fp8"
    (e4m3 products of linears, likewise).
    Raises CheckpointError for another class or an unsupported config, PrecisionError for another precision, or one
    that the weights' device is too old for.
    """
    if precision not in ("exact", "bf16", "int8", "fp8"):
        raise PrecisionError(f"precision {precision!r} is not available here; choose 'exact', 'bf16', 'int8' or 'fp8'")
    names = [c.__name__ for c in type(module).__mro__]
    kinds = REGISTRY | TEXT_ENCODERS
    found = next((n for n in names if n in kinds), None)
    if found is None:
        raise CheckpointError(f"{names[0]} has no native model; there are {', '.join(kinds)}")
    given: Any = module.config
    settings = dict(given) if isinstance(given, Mapping) else given.to_dict()
    weights = module.state_dict()
    build = kinds[found][1].from_weights
    wanted = dtype or (None if precision == "exact" else torch.bfloat16)
    where = next((t.device for t in weights.values()), torch.device("cpu"))
    return build(settings, weights, pack=wanted is not None, int8=plan_for(precision, where), dtype=wanted)


__all__ = [
    "REGISTRY", "TEXT_ENCODERS", "AutoencoderKL", "AutoencoderKLConfig", "AutoencoderTiny", "AutoencoderTinyConfig",
    "CLIPTextConfig", "CLIPTextModel", "CLIPTextModelWithProjection", "Config", "DiT", "DiTConfig", "FluxTransformer2D",
    "FluxTransformer2DConfig", "JointState", "Model", "PixArt", "PixArtConfig", "Posterior", "SD3Transformer2D",
    "SD3Transformer2DConfig", "TransformerState", "UNet2D",
    "UNet2DCondition", "UNet2DConditionConfig", "UNet2DConfig", "UNetState", "VQModel",
    "VQModelConfig", "from_diffusers",
]
