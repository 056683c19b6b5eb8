"""AutoencoderKL: pictures to latents and back (Stable Diffusion 1.x, 2.x, XL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ShapeError
from ..torch_modes import own_modes
from .base import Config, Model
from .gemm import Conv2d
from .single_file import FromSingleFile
from .tiling import check_image, run
from .vae_blocks import Decoder, Encoder, check_blocks


@dataclass(frozen=True)
class AutoencoderKLConfig(Config):
    """config.json of diffusers' AutoencoderKL.

    scaling_factor, shift_factor, latents_mean, latents_std and force_upcast are for the pipeline: encode and
    decode work on unscaled latents, in the dtype of the weights.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    act_fn: str = "silu"
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    choices: ClassVar = {"act_fn": ("silu", "swish")}

    def check(self) -> None:
        check_blocks(self)

    @property
    def downscale(self) -> int:
        """Pixels per latent, in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class Posterior:
    """A Gaussian for each latent: moments (N, 2 C, h, w) hold mean and log variance (Kingma and Welling
    2013)."""

    moments: Tensor

    @property
    def mean(self) -> Tensor:
        return self.moments.chunk(2, dim=1)[0]

    @cached_property
    def logvar(self) -> Tensor:
        return self.moments.chunk(2, dim=1)[1].clamp(-30.0, 20.0)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """mean + std * noise, noise drawn on the generator's device (CPU without one), one generator for the
        batch or one a picture. Raises ShapeError for another number of generators."""
        mean = self.mean
        if isinstance(generator, Sequence):
            if len(generator) != len(mean):
                raise ShapeError(f"{len(generator)} generators for {len(mean)} pictures; give one for each")
            noise = [_normal((1, *mean.shape[1:]), g, mean.dtype) for g in generator]
            drawn = torch.cat(noise) if noise else torch.zeros_like(mean)
        else:
            drawn = _normal(tuple(mean.shape), generator, mean.dtype)
        return mean + torch.exp(0.5 * self.logvar) * drawn.to(mean.device)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


class AutoencoderKL(FromSingleFile, Model):
    """Rombach et al. 2022, section 3.1. Inference only; nothing is written to the module by a call."""

    config_class = AutoencoderKLConfig
    part = "vae"

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__(config)
        latent = config.latent_channels
        self.encoder = Encoder(config, 2 * latent)
        self.decoder = Decoder(config, latent)
        self.quant_conv = Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    @own_modes()
    def decode(self, z: Tensor, *, tile: int | None = None, slice: bool = False) -> Tensor:
        """Latents (N, latent_channels, h, w) -> pictures (N, out_channels, h * f, w * f), about [-1, 1].

        z is already divided by scaling_factor. tile: edge of the tiles in latents (a multiple of 4, at least
        16 to be useful; diffusers uses 64), for pictures larger than that. slice: one picture at a time.
        Raises ShapeError.
        """
        check_image("latents", z, self.config.latent_channels)
        return run(self._decode, z.to(self.dtype), tile, self.config.downscale, slice)

    @own_modes()
    def encode(self, x: Tensor, *, tile: int | None = None, slice: bool = False) -> Posterior:
        """Pictures (N, in_channels, H, W) in [-1, 1] -> Posterior over latents (N, latent_channels, H/f,
        W/f).

        tile is in latents, as in decode. Raises ShapeError, also for H or W that f does not divide.
        """
        f = self.config.downscale
        check_image("pictures", x, self.config.in_channels, f)
        pixels = None if tile is None else tile * f
        return Posterior(run(self._encode, x.to(self.dtype), pixels, 1 / f, slice))

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _encode(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)
