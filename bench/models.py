"""One denoiser step and one VAE decode of Stable Diffusion size against diffusers, interleaved in one run.

    python bench/models.py                        # SD 1.5 UNet step (batch 2, 64x64 latents) and VAE decode (512 px)
    python bench/models.py --work unet --size 32 --repeats 3

Random weights of the real shapes, shared by every arm. Arms: diffusers eager fp32 and bf16 (channels-last), ldmfast
exact and bf16. Each repeat runs every arm once, in turn; medians and their ratio to diffusers fp32 of the same run are
printed. The record goes to bench/results/<device>/models-<work>.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from ops import commit, device_name, medians, write

import ldmfast

SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
          "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def random_model(cls: Any, config: dict[str, Any]) -> Any:
    """Without torch's slow initialisers: normal weights of unit gain."""
    with torch.device("meta"):
        model = cls(**config)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=p[0].numel() ** -0.5) if p.ndim > 1 else p.fill_(0.5)
    return model


def unet_arms(size: int) -> dict[str, Callable[[], Any]]:
    model = random_model(diffusers.UNet2DConditionModel, SD15_UNET)
    x, text = torch.randn(2, 4, size, size), torch.randn(2, 77, 768)
    exact = ldmfast.models.from_diffusers(model)
    low = ldmfast.models.from_diffusers(model, precision="bf16")
    states = [m.prepare([500.0], text.to(m.dtype)) for m in (exact, low)]
    half = random_model(diffusers.UNet2DConditionModel, SD15_UNET)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16).to(memory_format=torch.channels_last)
    return {
        "diffusers fp32": lambda: model(x, 500, text).sample,
        "diffusers bf16": lambda: half(x.bfloat16(), 500, text.bfloat16()).sample,
        "ldmfast exact": lambda: exact(x, 500.0, state=states[0]),
        "ldmfast bf16": lambda: low(x.bfloat16(), 500.0, state=states[1]),
    }


def vae_arms(size: int) -> dict[str, Callable[[], Any]]:
    model = random_model(diffusers.AutoencoderKL, SD_VAE)
    half = random_model(diffusers.AutoencoderKL, SD_VAE)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16).to(memory_format=torch.channels_last)
    exact = ldmfast.models.from_diffusers(model)
    low = ldmfast.models.from_diffusers(model, precision="bf16")
    z = torch.randn(1, 4, size, size)
    return {
        "diffusers fp32": lambda: model.decode(z).sample,
        "diffusers bf16": lambda: half.decode(z.bfloat16()).sample,
        "ldmfast exact": lambda: exact.decode(z),
        "ldmfast bf16": lambda: low.decode(z.bfloat16()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=("unet", "vae", "both"), default="both")
    parser.add_argument("--size", type=int, default=64, help="latents a side")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    for work, build in (("unet", unet_arms), ("vae", vae_arms)):
        if args.work not in (work, "both"):
            continue
        with torch.inference_mode():
            times = medians("cpu", build(args.size), args.repeats)
        base = times["diffusers fp32"]
        print(f"{work}, {args.size}x{args.size} latents, {torch.get_num_threads()} threads")
        for name, seconds in times.items():
            print(f"  {name:16s} {seconds:8.3f} s   {base / seconds:5.2f}x")
        record = {"device": device_name("cpu"), "work": work, "size": args.size, "repeats": args.repeats,
                  "threads": torch.get_num_threads(), "commit": commit(), "torch": torch.__version__,
                  "diffusers": diffusers.__version__, "medians_s": times}
        print(f"  written to {write(record, f'models-{work}.json')}")


if __name__ == "__main__":
    main()
