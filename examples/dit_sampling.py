"""Class-conditional pictures with a DiT or SiT in its original layout: ODE, SDE of any diffusion, or DDIM.

    python examples/dit_sampling.py DiT-XL-2-256x256.pt --vae vae.safetensors --labels 207 360
    python examples/dit_sampling.py SiT-XL-2-256x256.pt --vae vae.safetensors --sit --diffusion sigma
    python examples/dit_sampling.py                      # random weights, to see that it runs
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image

from ldmfast.models import AutoencoderKL, DiT, DiTConfig
from ldmfast.samplers import Schedule, make_table, sample, sit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", help="a .pt or .safetensors file; without it a small random network")
    parser.add_argument("--vae", help="the autoencoder's file; without it latents are printed, not decoded")
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sit", action="store_true", help="the network predicts a velocity (SiT)")
    parser.add_argument("--diffusion", help="SiT: constant, sigma or increasing-decreasing; without it the ODE")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    options = parser.parse_args()

    if options.weights:
        model = DiT.from_single_file(options.weights)
    else:
        model = DiT.from_config(DiTConfig.named("DiT-S/4", num_layers=2, num_embeds_ada_norm=10, sample_size=16))
    config, labels = model.config, torch.tensor(options.labels)
    if options.sit:
        table = sit(options.steps, diffusion=options.diffusion)
    else:
        schedule = Schedule(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")  # what DiT was trained with
        table = make_table(schedule, "ddim", options.steps)

    # no class and class side by side; everything that does not depend on the latents is made here, once
    both = torch.cat([torch.full_like(labels, config.num_embeds_ada_norm), labels])
    state = model.prepare(table.network_times.tolist(), class_labels=both)

    def denoise(x: torch.Tensor, t: float, stage: int) -> tuple[torch.Tensor, ...]:
        return model(torch.cat([x, x]), t, state=state)[:, :config.in_channels].chunk(2)

    noise = torch.randn(len(labels), config.in_channels, config.sample_size, config.sample_size,
                        generator=torch.Generator().manual_seed(0))
    latents = sample(denoise, noise * table.init_noise_sigma, table=table, guidance=options.guidance,
                     generator=torch.Generator().manual_seed(1))
    print(f"latents {tuple(latents.shape)}, standard deviation {latents.std():.3f}")
    if options.vae:
        vae = AutoencoderKL.from_single_file(options.vae)
        pixels = ((vae.decode(latents / 0.18215) + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        for label, picture in zip(options.labels, pixels):
            Image.fromarray(picture).save(f"class-{label}.png")


if __name__ == "__main__":
    main()
