"""Layers that the architectures share. Images are (N, C, H, W) in channels-last memory, tokens (N, T, C)
views.

Parameter names are diffusers'. No layer keeps anything between calls: what a step needs comes in as
arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

# rows of one small GEMM: one register tile of oneDNN and MKL, and weights are read once for 16 steps
_ROWS = 16

KeysValues = tuple[Tensor, Tensor]


def as_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) channels-last -> (N, H * W, C), a view."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h * w, c)


def as_image(tokens: Tensor, h: int, w: int) -> Tensor:
    """(N, H * W, C) -> (N, C, H, W) channels-last, a view."""
    n, _, c = tokens.shape
    return tokens.reshape(n, h, w, c).permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def by_rows(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """layer(x) for a few rows (R, K), computed in blocks of a fixed number of rows.

    A GEMM library picks its summation order by the number of rows, and a vectorised function treats the last
    elements of a tensor differently; with the size fixed, a row's result does not depend on how many others
    are computed with it (other timesteps, other pictures).
    """
    rows = x.shape[0]
    if rows == 0:
        return layer(x)
    padded = F.pad(x, (0, 0, 0, -rows % _ROWS))
    return torch.cat([layer(block) for block in padded.split(_ROWS)])[:rows]


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoids of t (R,) -> (R, dim) fp32 (Vaswani et al. 2017, section 3.5; DDPM's constants)."""
    half = dim // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t[:, None].float() * torch.exp(exponent / (half - freq_shift))
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=-1), (0, dim % 2))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "gelu": F.gelu, "mish": F.mish, "relu": F.relu}


class TimestepEmbedding(nn.Module):
    """linear_2(act(linear_1(x + cond_proj(condition)))), rows (R, in) -> (R, out)."""

    def __init__(self, in_dim: int, out_dim: int, cond_dim: int | None = None, post_act: str | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.cond_proj = None if cond_dim is None else nn.Linear(cond_dim, in_dim, bias=False)
        self.linear_2 = nn.Linear(out_dim, out_dim)
        self.post_act = post_act

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self._block, x)

    def _block(self, x: Tensor) -> Tensor:
        x = self.linear_2(F.silu(self.linear_1(x)))
        return x if self.post_act is None else ACTIVATIONS[self.post_act](x)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of (x + shift), with SiLU if asked; shift (N, C) is the time embedding."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = True):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, shift=shift,
                                   silu=self.silu)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm_modulate(x, weight=self.weight, bias=self.bias, eps=self.eps)


class ResnetBlock(nn.Module):
    """norm1, SiLU, conv1, time, norm2, SiLU, conv2, plus the (projected) input, divided by ``scale``.

    scale_shift False: the time embedding is added before norm2; True: it scales and shifts norm2's output.
    """

    slot = -1  # position of this block's time embedding in a UNet's per-call state

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None, groups: int, eps: float,
                 scale_shift: bool = False, scale: float = 1.0):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = nn.Linear(time_dim, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps, silu=not scale_shift)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        self.scale_shift = scale_shift
        self.scale = scale

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x))
        if self.scale_shift and time is not None:
            gain, shift = time[:, :, None, None].chunk(2, dim=1)
            h = F.silu(self.norm2(h).mul_(1 + gain).add_(shift), inplace=True)
        else:
            h = self.norm2(h, time)
        h = self.conv2(h).add_(x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h if self.scale == 1.0 else h.div_(self.scale)


class Downsample(nn.Module):
    """Halves the size with a strided convolution; padding 0 pads the right and lower edge only."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the size (or goes to ``size``) with nearest neighbours, then convolves."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None or tuple(size) == (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(ops.upsample2x(x))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Attention(nn.Module):
    """Multi-head attention on tokens (N, T, C); keys and values come from the tokens or from a context."""

    slot = -1  # position of this block's prompt keys and values in a UNet's per-call state
    context: slice = slice(None)  # tokens of the prompt that this block sees

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None,
                 bias: bool = False):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.context_dim = context_dim
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def keys_values(self, context: Tensor) -> KeysValues:
        """Context (N, T, C) -> keys and values (N, T, heads, head_dim)."""
        split = (self.heads, -1 if context.numel() else self.to_k.out_features // self.heads)
        return self.to_k(context).unflatten(-1, split), self.to_v(context).unflatten(-1, split)

    def forward(self, x: Tensor, kv: KeysValues | None = None, bias: Tensor | None = None) -> Tensor:
        k, v = self.keys_values(x) if kv is None else kv
        q = self.to_q(x).unflatten(-1, k.shape[2:])
        return self.to_out[0](ops.attention(q, k, v, bias=bias).flatten(2))


class SpatialNorm(nn.Module):
    """GroupNorm modulated at every pixel by the quantised latent (MoVQ, Zheng et al. 2022, equation 4)."""

    def __init__(self, channels: int, latent_channels: int, silu: bool = True):
        super().__init__()
        self.norm_layer = GroupNorm(32, channels, 1e-6, silu=False)
        self.conv_y = nn.Conv2d(latent_channels, channels, 1)
        self.conv_b = nn.Conv2d(latent_channels, channels, 1)
        self.silu = silu

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        latent = F.interpolate(latent, size=x.shape[2:], mode="nearest")
        x = self.norm_layer(x).mul_(self.conv_y(latent)).add_(self.conv_b(latent))
        return F.silu(x, inplace=True) if self.silu else x


class SpatialAttention(Attention):
    """Self-attention over the pixels of an image, with its norm and residual: (N, C, H, W) in and out."""

    def __init__(self, channels: int, head_dim: int, groups: int | None, eps: float, scale: float = 1.0,
                 latent_channels: int | None = None):
        super().__init__(channels, channels // head_dim, head_dim, bias=True)
        self.group_norm = None if groups is None else GroupNorm(groups, channels, eps, silu=False)
        if latent_channels is not None:
            self.spatial_norm = SpatialNorm(channels, latent_channels, silu=False)
        self.scale = scale

    def forward(self, x: Tensor, latent: Tensor | None = None) -> Tensor:  # type: ignore[override]
        h = x if latent is None else self.spatial_norm(x, latent)
        h = h if self.group_norm is None else self.group_norm(h)
        h = as_image(super().forward(as_tokens(h)), *x.shape[2:]).add_(x)
        return h if self.scale == 1.0 else h.div_(self.scale)


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))
