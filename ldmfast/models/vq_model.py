"""VQModel: the vector-quantised autoencoder of the first latent diffusion models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..torch_modes import own_modes
from .base import Config, Model
from .gemm import Conv2d
from .layers import Embedding
from .tiling import check_image, run
from .vae_blocks import Decoder, Encoder, check_blocks

_ROWS = 4096  # pixels whose distances to the codebook are held at once: 128 MiB for 8192 codes in fp32


@dataclass(frozen=True)
class VQModelConfig(Config):
    """config.json of diffusers' VQModel. scaling_factor and force_upcast are for the pipeline."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 3
    sample_size: int = 32
    num_vq_embeddings: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    scaling_factor: float = 0.18215
    norm_type: str = "group"
    mid_block_add_attention: bool = True
    lookup_from_codebook: bool = False
    force_upcast: bool = False

    choices: ClassVar = {"act_fn": ("silu", "swish"), "norm_type": ("group", "spatial")}

    def check(self) -> None:
        check_blocks(self)

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


class Codebook(nn.Module):
    """Nearest of the learned vectors (van den Oord et al. 2017, equation 2)."""

    def __init__(self, codes: int, channels: int):
        super().__init__()
        self.embedding = Embedding(codes, channels)

    def forward(self, z: Tensor) -> Tensor:
        """(N, C, h, w) -> the same with every pixel replaced by its nearest code, channels-last."""
        pixels = z.permute(0, 2, 3, 1)
        blocks = pixels.flatten(0, 2).split(_ROWS)
        nearest = [torch.cdist(rows, self.embedding.weight).argmin(1) for rows in blocks]
        return self.lookup(torch.cat(nearest).view(pixels.shape[:3]))

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (N, h, w) int -> (N, C, h, w), channels-last."""
        return self.embedding(indices).permute(0, 3, 1, 2)


class VQModel(Model):
    """Esser et al. 2021, section 3.1; norm_type "spatial" is MoVQ (Zheng et al. 2022). Nothing is written to
    the module by a call."""

    config_class = VQModelConfig

    def __init__(self, config: VQModelConfig):
        super().__init__(config)
        c = config
        codes = c.vq_embed_dim or c.latent_channels
        self.encoder = Encoder(c, c.latent_channels)
        self.quant_conv = Conv2d(c.latent_channels, codes, 1)
        self.quantize = Codebook(c.num_vq_embeddings, codes)
        self.post_quant_conv = Conv2d(codes, c.latent_channels, 1)
        # diffusers sizes the spatial norms by latent_channels and feeds them the codes: the two must agree
        self.decoder = Decoder(c, c.latent_channels, c.latent_channels if c.norm_type == "spatial" else None)

    @own_modes()
    def decode(self, h: Tensor, force_not_quantize: bool = False, *, tile: int | None = None,
               slice: bool = False) -> Tensor:
        """Latents (N, codes, h, w) -> pictures (N, out_channels, h * f, w * f), about [-1, 1].

        Latents are first moved to their nearest codes, unless force_not_quantize. With the config's
        lookup_from_codebook and force_not_quantize, h holds code numbers (N, h, w). tile, slice: as in
        AutoencoderKL.decode. Raises ShapeError.
        """
        c = self.config
        if force_not_quantize and c.lookup_from_codebook:
            if h.ndim != 3 or h.is_floating_point():
                raise ShapeError(f"code numbers have shape {tuple(h.shape)} and {h.dtype}, need whole "
                                 "numbers "
                                 "(pictures, height, width)")
            codes = self.quantize.lookup(h)
        else:
            check_image("latents", h, c.vq_embed_dim or c.latent_channels)
            h = h.to(self.dtype)
            codes = h if force_not_quantize else self.quantize(h)
        return run(self._decode, codes, tile, c.downscale, slice)

    @own_modes()
    def encode(self, x: Tensor, *, tile: int | None = None, slice: bool = False) -> Tensor:
        """Pictures (N, in_channels, H, W) in [-1, 1] -> latents (N, codes, H / f, W / f), not quantised.
        tile (in latents), slice: as in AutoencoderKL.encode. Raises ShapeError."""
        c = self.config
        check_image("pictures", x, c.in_channels, c.downscale)
        pixels = None if tile is None else tile * c.downscale
        return run(self._encode, x.to(self.dtype), pixels, 1 / c.downscale, slice)

    def _encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def _decode(self, codes: Tensor) -> Tensor:
        spatial = self.config.norm_type == "spatial"
        return self.decoder(self.post_quant_conv(codes), codes if spatial else None)
