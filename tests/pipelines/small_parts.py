"""What the folders of these tests are made of."""

from __future__ import annotations

from pathlib import Path

import torch

import ldmfast

TOKENIZER = Path(ldmfast.__file__).parent / "assets" / "clip_tokenizer"


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Every parameter matters: nothing is left at zero or one as initialisers do."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        fan = p[0].numel() if p.ndim > 1 else 1
        centre = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
        spread = fan**-0.5 if p.ndim > 1 else 0.1
        p.data.copy_(centre + spread * torch.randn(p.shape, generator=g))


def vae(seed: int):
    from diffusers import AutoencoderKL

    model = AutoencoderKL(block_out_channels=(16, 16, 32, 32), norm_num_groups=8, layers_per_block=1, latent_channels=4,
                          down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                          sample_size=64).eval()
    randomise(model, seed)
    return model


def text(width: int, layers: int, projected: bool, seed: int):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                            num_attention_heads=2, vocab_size=49408, projection_dim=width,
                            hidden_act="gelu" if projected else "quick_gelu")
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    randomise(model, seed)
    return model
