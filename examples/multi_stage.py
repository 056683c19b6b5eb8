"""Sampling in stages: what one stage has drawn, without its detail, is a condition of the next (Diffusion on Diffusion,
Yue et al. 2024).

    python examples/multi_stage.py                    # random weights
    python examples/multi_stage.py --stages 3 --steps 20
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmfast.models import DiT, DiTConfig
from ldmfast.samplers import sample_stages, sit

SIZE, CHANNELS = 16, 4


def embed(sample: Tensor) -> Tensor:
    """Stands for the trained embedding of the paper: means over 4x4 latents, detail dropped."""
    return F.interpolate(F.avg_pool2d(sample, 4), scale_factor=4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()

    labels, table = torch.tensor(options.labels), sit(options.steps)
    # the prior comes in as more channels; the first stage has zeros there
    model = DiT.from_config(DiTConfig.named("SiT-S/4", num_layers=2, num_embeds_ada_norm=10, sample_size=SIZE,
                                            in_channels=2 * CHANNELS, out_channels=CHANNELS, freq_shift=0))
    state = model.prepare(table.network_times.tolist(), class_labels=labels)

    def stage(prior: Tensor | None):
        def denoise(x: Tensor, t: float, index: int) -> Tensor:
            given = torch.zeros_like(x) if prior is None else prior
            return model(torch.cat([x, given], dim=1), t, state=state)
        return denoise

    g = torch.Generator().manual_seed(0)
    noises = [torch.randn(len(labels), CHANNELS, SIZE, SIZE, generator=g) for _ in range(options.stages)]
    latents = sample_stages([stage] * options.stages, noises, embed, table)
    print(f"latents {tuple(latents.shape)} after {options.stages} stages, standard deviation {latents.std():.3f}")


if __name__ == "__main__":
    main()
