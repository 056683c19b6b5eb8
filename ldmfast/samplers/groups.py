"""Two groups of channels under one noise process, such as latents and semantic features; and stages of which each is
conditioned on what the one before has drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LdmfastError, ShapeError
from .sample import Denoiser, sample
from .step_table import StepTable


def representation_guidance(denoise: Callable[[Tensor, float, int], Tensor], channels: int,
                            empty: float | Tensor = 0.0) -> Denoiser:
    """A denoiser for a table with ``guidance`` w that draws x and features z together and pulls x towards what z says:
    the score of x is grad log p(x) + w grad log p(z | x) (ReDi: Kouzelis et al. 2025, "Representation Guidance").

    denoise(x_in, t, stage): one network for both groups, (N, C, ...) with x in the first ``channels`` of C. empty: what
    the network was shown in place of z where it had to do without, a number or (C - channels, ...). Both cases are one
    batch of 2 N. z's own prediction is the joint one. For w = 1, which is the joint score, give ``denoise`` itself.
    Raises ShapeError if there are no channels beside x.
    """
    def pair(x_in: Tensor, t: float, stage: int) -> tuple[Tensor, Tensor]:
        if not 0 < channels < x_in.shape[1]:
            raise ShapeError(f"representation guidance: x has {x_in.shape[1]} channels, of which {channels} were said "
                             "to be the picture's; some must be left for the features")
        alone = x_in.clone()
        alone[:, channels:] = empty
        without, joint = denoise(torch.cat([alone, x_in]), t, stage).chunk(2)
        without = without.clone()
        without[:, channels:] = joint[:, channels:]
        return without, joint

    return pair


def sample_stages(stages: Sequence[Callable[[Tensor | None], Denoiser]], noises: Sequence[Tensor],
                  embed: Callable[[Tensor], Tensor], tables: StepTable | Sequence[StepTable],
                  **options: Any) -> Tensor:
    """Draws stage by stage, each conditioned on the sample of the one before (Diffusion on Diffusion: Yue et al. 2024).

    stages: condition -> denoiser; the first is given None. noises: (pictures, ...) the start of each stage. embed: what
    a sample tells the next stage; it keeps what is semantic and drops detail. tables: one for all stages, or one each.
    options: as for ``sample`` (generator, guidance, ...). Returns the last stage's sample. Raises LdmfastError for
    different numbers of stages, noises and tables.
    """
    given = [tables] * len(stages) if isinstance(tables, StepTable) else list(tables)
    if not stages or len(noises) != len(stages) or len(given) != len(stages):
        raise LdmfastError(f"sample_stages: {len(stages)} stages, {len(noises)} noises and {len(given)} tables; their "
                           "numbers must agree")
    x: Tensor | None = None
    for make, noise, table in zip(stages, noises, given):
        condition = None if x is None else embed(x)
        x = sample(make(condition), noise * table.init_noise_sigma, table=table, **options)
    assert x is not None
    return x
