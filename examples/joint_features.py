"""Latents and semantic features denoised together, the picture pulled towards its own features (ReDi, Kouzelis et al.
2025): one DiT whose channels are both groups, with representation guidance.

    python examples/joint_features.py                 # random weights: latents of 4 channels, features of 8
    python examples/joint_features.py --weight 2.0
"""

from __future__ import annotations

import argparse

import torch

from ldmfast.models import DiT, DiTConfig
from ldmfast.samplers import representation_guidance, sample, sit

LATENT, FEATURES = 4, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--weight", type=float, default=1.5, help="of the features' pull; 1 is plain joint sampling")
    options = parser.parse_args()

    channels = LATENT + FEATURES
    model = DiT.from_config(DiTConfig.named("SiT-S/4", num_layers=2, num_embeds_ada_norm=10, sample_size=16,
                                            in_channels=channels, out_channels=channels, freq_shift=0))
    table = sit(options.steps, diffusion="sigma").with_guidance(options.weight)
    labels = torch.tensor(options.labels)
    # rows without features come first, then the joint ones
    state = model.prepare(table.network_times.tolist(), class_labels=labels.repeat(2))
    denoise = representation_guidance(lambda x, t, stage: model(x, t, state=state), LATENT)
    noise = torch.randn(len(labels), channels, 16, 16, generator=torch.Generator().manual_seed(0))
    both = sample(denoise, noise, table=table, generator=torch.Generator().manual_seed(1))
    for name, part in (("latents", both[:, :LATENT]), ("features", both[:, LATENT:])):
        print(f"{name} {tuple(part.shape)}, standard deviation {part.std():.3f}")


if __name__ == "__main__":
    main()
