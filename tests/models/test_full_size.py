"""The real Stable Diffusion 1.5 sizes once: weights are drawn once and shared, so that both sides fit in
memory."""

from __future__ import annotations

import gc

import diffusers
import torch
from model_cases import draw, error
from torch import nn

from ldmfast.models import from_diffusers

SD15_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
            "sample_size": 512}


def filled(build, seed: int) -> nn.Module:
    """Built on the meta device, then given random weights without torch's own initialisation.

    Noise is drawn once and every tensor takes a slice of it from a place of its own: 860 million normal
    numbers would take longer than the test.
    """
    with torch.device("meta"):
        module = build()
    module.to_empty(device="cpu")
    noise = draw((1 << 20) + max(p.numel() for p in module.parameters()), seed=seed)
    with torch.no_grad():
        for i, (name, p) in enumerate(module.named_parameters()):
            start = (i * 7919) % (1 << 20)
            p.copy_(noise[start:start + p.numel()].view_as(p))
            p.mul_(p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1)
    return module.eval().requires_grad_(False)


def test_unet_sd15() -> None:
    theirs = filled(lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768), 0)
    ours = from_diffusers(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    sample, prompt = draw(1, 4, 64, 64), draw(1, 77, 768, seed=2)
    with torch.no_grad():
        expected = theirs(sample, 500, prompt).sample
    assert error(ours(sample, 500, prompt), expected) <= 1e-4
    del theirs, ours
    gc.collect()


def test_vae_sd15() -> None:
    theirs = filled(lambda: diffusers.AutoencoderKL(**SD15_VAE), 1)
    ours = from_diffusers(theirs)
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    z, x = draw(1, 4, 16, 24), draw(1, 3, 128, 192)
    with torch.no_grad():
        expected, mean = theirs.decode(z).sample, theirs.encode(x).latent_dist.mean
    assert error(ours.decode(z), expected) <= 1e-4
    assert error(ours.encode(x).mean, mean) <= 1e-4
