"""Encoder and decoder of the autoencoders, shared by AutoencoderKL and VQModel."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import CheckpointError
from .base import unsupported
from .gemm import Conv2d
from .layers import (
    Downsample,
    GroupNorm,
    ResnetBlock,
    SpatialAttention,
    SpatialNorm,
    Upsample,
    channels_last,
)

_EPS = 1e-6
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


def check_blocks(config) -> None:
    """Raises CheckpointError for block types or channel lists that are not supported."""
    levels = len(config.block_out_channels)
    for key, kinds in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        types = getattr(config, key)
        if len(types) != levels:
            raise CheckpointError(f"config key {key!r} has {len(types)} entries, block_out_channels has "
                                  f"{levels}; "
                                  "they must agree")
        for name in types:
            if name not in kinds:
                raise unsupported(key, name, " or ".join(kinds))
    for c in config.block_out_channels:
        if not config.norm_num_groups or c % config.norm_num_groups:
            raise CheckpointError(f"config key 'norm_num_groups' = {config.norm_num_groups} does not divide "
                                  f"{c} of block_out_channels")


class SpatialResnetBlock(ResnetBlock):
    """A ResNet block whose norms are modulated by the latent instead of a time embedding."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, latent_channels: int):
        super().__init__(in_channels, out_channels, None, groups, _EPS)
        self.norm1 = SpatialNorm(in_channels, latent_channels)  # type: ignore[assignment]
        self.norm2 = SpatialNorm(out_channels, latent_channels)  # type: ignore[assignment]

    def forward(self, x: Tensor, latent: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(self.norm1(x, latent)), latent)
        return self.conv2(h, x if self.conv_shortcut is None else self.conv_shortcut(x))


def _resnet(a: int, b: int, groups: int, latent_channels: int | None) -> ResnetBlock:
    return (ResnetBlock(a, b, None, groups, _EPS) if latent_channels is None
            else SpatialResnetBlock(a, b, groups, latent_channels))


def _attention(channels: int, groups: int, latent_channels: int | None) -> SpatialAttention:
    return SpatialAttention(channels, channels, groups if latent_channels is None else None, _EPS,
                            latent_channels=latent_channels)


class Level(nn.Module):
    """ResNet blocks of one resolution, attention after each if asked, then down- or upsampling."""

    def __init__(self, inputs: list[int], channels: int, groups: int, attention: bool,
                 latent_channels: int | None = None, down: bool = False, up: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(c, channels, groups, latent_channels) for c in inputs)
        self.attentions = nn.ModuleList(
            _attention(channels, groups, latent_channels) for _ in inputs if attention)
        self.downsamplers = nn.ModuleList([Downsample(channels, padding=0)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if up else [])

    def forward(self, x: Tensor, latent: Tensor | None = None) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, latent)
            if self.attentions:
                x = self.attentions[i](x, latent)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool, latent_channels: int | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(channels, channels, groups, latent_channels) for _ in range(2))
        self.attentions = nn.ModuleList(
            [_attention(channels, groups, latent_channels)] if attention else [])

    def forward(self, x: Tensor, latent: Tensor | None = None) -> Tensor:
        x = self.resnets[0](x, latent)
        for attention in self.attentions:
            x = attention(x, latent)
        return self.resnets[1](x, latent)


class Encoder(nn.Module):
    """Picture (N, in, H, W) -> (N, out, H / 2^(levels - 1), ...)."""

    def __init__(self, config, out_channels: int):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        n = len(channels)
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level([channels[max(i - 1, 0)]] + [channels[i]] * (config.layers_per_block - 1), channels[i],
                  groups, _DOWN[config.down_block_types[i]], down=i < n - 1) for i in range(n))
        self.mid_block = Middle(channels[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, channels[-1], _EPS)
        self.conv_out = Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(channels_last(x))
        for block in self.down_blocks:
            x = block(x)
        return self.conv_norm_out.conv(self.conv_out, self.mid_block(x))


class Decoder(nn.Module):
    """Latent (N, in, h, w) -> picture (N, out, h * 2^(levels - 1), ...). latent_channels: for spatial
    norms."""

    def __init__(self, config, in_channels: int, latent_channels: int | None = None):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        n = len(channels)
        self.conv_in = Conv2d(in_channels, channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups, config.mid_block_add_attention, latent_channels)
        self.up_blocks = nn.ModuleList(
            Level([channels[max(i - 1, 0)]] + [channels[i]] * config.layers_per_block, channels[i], groups,
                  _UP[config.up_block_types[i]], latent_channels, up=i < n - 1) for i in range(n))
        self.conv_norm_out = (GroupNorm(groups, channels[-1], _EPS) if latent_channels is None
                              else SpatialNorm(channels[-1], latent_channels))
        self.conv_out = Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor, latent: Tensor | None = None) -> Tensor:
        x = self.mid_block(self.conv_in(channels_last(z)), latent)
        for block in self.up_blocks:
            x = block(x, latent)
        if isinstance(self.conv_norm_out, GroupNorm):
            return self.conv_norm_out.conv(self.conv_out, x)
        return self.conv_out(self.conv_norm_out(x, latent))
