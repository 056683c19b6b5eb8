"""AutoencoderTiny: TAESD, the autoencoder that is small enough for previews."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import CheckpointError
from ..torch_modes import own_modes
from .base import Config, Model, unsupported
from .gemm import Conv2d
from .layers import channels_last
from .tiling import check_image, run

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU, "gelu": nn.GELU, "mish": nn.Mish}


@dataclass(frozen=True)
class AutoencoderTinyConfig(Config):
    """config.json of diffusers' AutoencoderTiny. latent_magnitude and latent_shift are for storing latents as
    bytes; scaling_factor, shift_factor and force_upcast are for the pipeline.
    """

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    choices: ClassVar = {"act_fn": tuple(_ACTIVATIONS), "upsample_fn": ("nearest", "bilinear", "bicubic")}
    inert: ClassVar = frozenset({"block_out_channels"})  # a copy of the decoder's that diffusers writes

    def check(self) -> None:
        for side in ("encoder", "decoder"):
            widths, blocks = getattr(self, f"{side}_block_out_channels"), getattr(self, f"num_{side}_blocks")
            if len(widths) != len(blocks) or len(set(widths)) > 1:
                raise CheckpointError(f"config keys of the {side} give widths {list(widths)} for blocks "
                                      f"{list(blocks)}; needs one equal width for each")
        if self.upsampling_scaling_factor < 1:
            raise unsupported("upsampling_scaling_factor", self.upsampling_scaling_factor, "at least 1")

    @property
    def downscale(self) -> int:
        """Pixels per latent, in each direction, of the encoder."""
        return 2 ** (len(self.num_encoder_blocks) - 1)


class TinyBlock(nn.Module):
    """relu(x + three convolutions of x)."""

    def __init__(self, channels: int, activation: type[nn.Module]):
        super().__init__()
        self.conv = nn.Sequential(
            Conv2d(channels, channels, 3, padding=1), activation(),
            Conv2d(channels, channels, 3, padding=1), activation(),
            Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).add_(x).relu_()


class TinyUpsample(nn.Module):
    def __init__(self, factor: int, mode: str):
        super().__init__()
        self.factor, self.mode = factor, mode

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "nearest" and self.factor == 2:
            return ops.upsample2x(x)
        return F.interpolate(x, scale_factor=self.factor, mode=self.mode)


class TinyEncoder(nn.Module):
    def __init__(self, c: AutoencoderTinyConfig):
        super().__init__()
        width, activation = c.encoder_block_out_channels[0], _ACTIVATIONS[c.act_fn]
        layers: list[nn.Module] = []
        for i, blocks in enumerate(c.num_encoder_blocks):
            layers.append(Conv2d(width, width, 3, 2, 1, bias=False) if i
                          else Conv2d(c.in_channels, width, 3, padding=1))
            layers += [TinyBlock(width, activation) for _ in range(blocks)]
        self.layers = nn.Sequential(*layers, Conv2d(width, c.latent_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(channels_last(x.add(1).div_(2)))


class TinyDecoder(nn.Module):
    def __init__(self, c: AutoencoderTinyConfig):
        super().__init__()
        width, activation = c.decoder_block_out_channels[0], _ACTIVATIONS[c.act_fn]
        layers: list[nn.Module] = [Conv2d(c.latent_channels, width, 3, padding=1), activation()]
        for i, blocks in enumerate(c.num_decoder_blocks):
            last = i == len(c.num_decoder_blocks) - 1
            layers += [TinyBlock(width, activation) for _ in range(blocks)]
            if not last:
                layers.append(TinyUpsample(c.upsampling_scaling_factor, c.upsample_fn))
            layers.append(Conv2d(width, c.out_channels if last else width, 3, padding=1, bias=last))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        soft = (channels_last(z) / 3).tanh_().mul_(3)  # a latent beyond +-3 has no meaning to the decoder
        return self.layers(soft).mul_(2).sub_(1)


class AutoencoderTiny(Model):
    """Bohan's tiny autoencoder for Stable Diffusion; latents are those of AutoencoderKL times
    scaling_factor."""

    config_class = AutoencoderTinyConfig

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__(config)
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)

    @own_modes()
    def decode(self, z: Tensor, *, tile: int | None = None, slice: bool = False) -> Tensor:
        """Latents (N, latent_channels, h, w) -> pictures (N, out_channels, h * f, w * f), about [-1, 1], not
        clamped. tile, slice: as in AutoencoderKL.decode. Raises ShapeError."""
        c = self.config
        check_image("latents", z, c.latent_channels)
        scale = c.upsampling_scaling_factor ** (len(c.num_decoder_blocks) - 1)
        return run(self.decoder, z.to(self.dtype), tile, scale, slice)

    @own_modes()
    def encode(self, x: Tensor, *, tile: int | None = None, slice: bool = False) -> Tensor:
        """Pictures (N, in_channels, H, W) in [-1, 1] -> latents (N, latent_channels, H / f, W / f).
        tile (in latents), slice: as in AutoencoderKL.encode. Raises ShapeError."""
        c = self.config
        check_image("pictures", x, c.in_channels, c.downscale)
        pixels = None if tile is None else tile * c.downscale
        return run(self.encoder, x.to(self.dtype), pixels, 1 / c.downscale, slice)
