"""Layers that the architectures share. Images are (N, C, H, W) in channels-last memory, tokens (N, T, C)
views.

Parameter names are diffusers'. No layer keeps anything between calls: what a step needs comes in as
arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .direct import Direct, watched
from .gemm import Conv2d, GatedLinear, Linear, Quantized
from .hooks import Attend
from .rowwise import RowCodes

# rows of one small GEMM: one register tile of oneDNN and MKL, and weights are read once for 16 steps
_ROWS = 16

KeysValues = tuple[Tensor, Tensor]


@overload
def as_tokens(x: Tensor) -> Tensor: ...
@overload
def as_tokens(x: Quantized) -> Quantized: ...
def as_tokens(x: Tensor | Quantized) -> Tensor | Quantized:
    """(N, C, H, W) channels-last -> (N, H * W, C), a view."""
    if isinstance(x, Quantized):
        return x._replace(values=as_tokens(x.values))
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


class TimestepEmbedding(Direct):
    """linear_2(act(linear_1(x + cond_proj(condition)))), rows (R, in) -> (R, out)."""

    def __init__(self, in_dim: int, out_dim: int, cond_dim: int | None = None, post_act: str | None = None):
        super().__init__()
        self.linear_1 = Linear(in_dim, out_dim)
        self.cond_proj = None if cond_dim is None else Linear(cond_dim, in_dim, bias=False)
        self.linear_2 = Linear(out_dim, out_dim)
        self.post_act = post_act

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self._block, x)

    def _block(self, x: Tensor) -> Tensor:
        x = self.linear_2(F.silu(self.linear_1(x)))
        return x if self.post_act is None else ACTIVATIONS[self.post_act](x)


class Embedding(nn.Embedding):
    """torch's, which on the meta device draws nothing: there its normal numbers would import torch's compiler."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class GroupNorm(Direct, nn.GroupNorm):
    """GroupNorm of (x + shift), with SiLU if asked; shift (N, C) is the time embedding."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = True):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        own = self._parameters  # as attributes, each would cost a search through three dictionaries
        return ops.group_norm_silu(x, self.num_groups, own["weight"], own["bias"], self.eps, shift=shift,
                                   silu=self.silu)

    def into(self, layer: Linear | Conv2d, x: Tensor, shift: Tensor | None = None) -> Tensor | Quantized:
        """forward(), in the form that ``layer`` takes: 8 bits, with its padding, for an int8 layer."""
        if layer.int8 is None:
            return self(x, shift)
        return Quantized(*ops.group_norm_silu_q8(x, self.num_groups, self.weight, self.bias, self.eps, shift=shift,
                                                 silu=self.silu, pad=layer.border))


    def conv(self, layer: Conv2d, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """layer(forward(x, shift), residual); as one op where convolutions are our own, nobody looks between or has
        another forward in place, and the layer has no adapter, which needs its input."""
        own, w = self._parameters, layer.int8
        if layer.lora is None and not watched(self) and not watched(layer):
            norm = (x, self.num_groups, own["weight"], own["bias"], self.eps)
            if w is not None and w.own:
                return ops.norm_conv2d_q8(*norm, w.values, w.scale, w.sums, w.bias, residual, shift=shift,
                                          silu=self.silu, **layer.sizes())
            if w is None and layer.own:
                return ops.norm_conv2d(*norm, layer.weight, layer.bias, residual, shift=shift, silu=self.silu,
                                       **layer.sizes())
        inner = self.into(layer, x, shift)
        return layer(inner) if residual is None else layer(inner, residual)


class LayerNorm(Direct, nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        own = self._parameters
        return ops.layer_norm_modulate(x, None, None, own["weight"], own["bias"], self.eps)

    def into(self, layer: Linear, x: Tensor) -> Any:
        """forward(), in the form that ``layer`` takes."""
        if layer.int8 is None and not layer.row_form:
            return self(x)
        return normed_for(layer, x, None, None, self.weight, self.bias, self.eps)


def normed_for(layer: Linear, x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None,
               bias: Tensor | None, eps: float) -> Any:
    """ops.layer_norm_modulate in the form that ``layer`` takes: Quantized for an int8 layer, RowCodes for one that
    multiplies in 8 bits by rows, otherwise a tensor."""
    arguments = (x, scale, shift, weight, bias, eps)
    if layer.int8 is not None:
        return Quantized(*ops.layer_norm_modulate_q8(*arguments))
    if layer.row_form:
        return RowCodes(*ops.layer_norm_modulate_rows(*arguments, fp8=layer.row_form == "fp8"), x.dtype)
    return ops.layer_norm_modulate(*arguments)


class ResnetBlock(Direct):
    """norm1, SiLU, conv1, time, norm2, SiLU, conv2, plus the (projected) input, divided by ``scale``.

    scale_shift False: the time embedding is added before norm2; True: it scales and shifts norm2's output.
    """

    slot = -1  # position of this block's time embedding in a UNet's per-call state

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None, groups: int, eps: float,
                 scale_shift: bool = False, scale: float = 1.0):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if time_dim is not None:
            self.time_emb_proj = Linear(time_dim, out_channels * (2 if scale_shift else 1))
        self.norm2 = GroupNorm(groups, out_channels, eps, silu=not scale_shift)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)
        self.scale_shift = scale_shift
        self.scale = scale

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        own: Any = self._modules
        conv1, norm2, conv2, shortcut = own["conv1"], own["norm2"], own["conv2"], self.conv_shortcut
        h = own["norm1"].conv(conv1, x)
        x = x if shortcut is None else shortcut(x)
        if self.scale_shift and time is not None:
            gain, shift = time[:, :, None, None].chunk(2, dim=1)
            h = conv2(F.silu(norm2(h).mul_(1 + gain).add_(shift), inplace=True), x)
        else:
            h = norm2.conv(conv2, h, time, x)
        return h if self.scale == 1.0 else h.div_(self.scale)


class Downsample(Direct):
    """Halves the size with a strided convolution; padding 0 pads the right and lower edge only."""

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))


class Upsample(Direct):
    """Doubles the size (or goes to ``size``) with nearest neighbours, then convolves."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None or tuple(size) == (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(x, upsample=True)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Joined(Direct):
    """A module some of whose linears share an input and can become one product."""

    joins: tuple[str, ...]  # the layers that share an input, in the order in which ``join`` puts them side by side
    joined: str  # the name of what ``join`` makes

    @property
    def groups(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """What ``join`` makes, and of which layers; a module with several inputs has several."""
        return ((self.joined, self.joins),)

    def join(self, joined: str | None = None) -> None:
        """Makes one layer (by default the one called ``joined``) of those that share an input, once; theirs are None
        afterwards."""
        joined = joined or self.joined
        joins = dict(self.groups)[joined]
        setattr(self, joined, Linear.join([getattr(self, n) for n in joins]))
        for n in joins:
            setattr(self, n, None)


class Attention(Joined):
    """Multi-head attention on tokens (N, T, C); keys and values come from the tokens or from a context."""

    slot = -1  # position of this block's prompt keys and values in a UNet's per-call state
    context: slice = slice(None)  # tokens of the prompt that this block sees
    fp8 = False  # Model.attend_in_fp8
    to_qkv: Linear | None  # to_q, to_k and to_v as one product, or to_k and to_v of a cross-attention, after join()
    to_kv: Linear | None

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None,
                 bias: bool = False):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.head_dim = head_dim
        self.context_dim = context_dim
        self.joins = ("to_q", "to_k", "to_v") if context_dim is None else ("to_k", "to_v")
        self.joined = "to_qkv" if context_dim is None else "to_kv"
        self.to_q = Linear(dim, inner, bias=bias)
        self.to_k = Linear(context_dim or dim, inner, bias=bias)
        self.to_v = Linear(context_dim or dim, inner, bias=bias)
        self.to_out = nn.ModuleList([Linear(inner, dim)])
        self.to_qkv = self.to_kv = None

    @property
    def entry(self) -> Linear:
        """The layer that takes the tokens."""
        return self.to_q if self.to_qkv is None else self.to_qkv

    def _heads(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, heads, head_dim), a view."""
        n, tokens, _ = x.shape
        return x.view(n, tokens, self.heads, self.head_dim)

    def _parts(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(N, T, parts * C) -> parts times (N, T, heads, head_dim), views."""
        n, tokens, _ = x.shape
        return x.view(n, tokens, parts, self.heads, self.head_dim).unbind(2)

    def keys_values(self, context: Tensor | Quantized) -> KeysValues:
        """Context (N, T, C) -> keys and values (N, T, heads, head_dim)."""
        if self.to_kv is not None:
            k, v = self._parts(self.to_kv(context), 2)
            return k, v
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def forward(self, x: Tensor | Quantized, kv: KeysValues | None = None, bias: Tensor | None = None,
                residual: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        if kv is not None:
            q, (k, v) = self._heads(self.to_q(x)), kv
        elif self.to_qkv is not None:
            q, k, v = self._parts(self.to_qkv(x), 3)
        else:
            q, (k, v) = self._heads(self.to_q(x)), self.keys_values(x)
        to_out, = self.to_out
        own = self.fp8 and kv is None and bias is None
        mixed = (attend(q, k, v, bias, 0) if attend is not None else
                 ops.attention_fp8(q, k, v) if own else ops.attention(q, k, v, bias=bias))
        return to_out(mixed.flatten(2), residual)


class SpatialNorm(Direct):
    """GroupNorm modulated at every pixel by the quantised latent (MoVQ, Zheng et al. 2022, equation 4)."""

    def __init__(self, channels: int, latent_channels: int, silu: bool = True):
        super().__init__()
        self.norm_layer = GroupNorm(32, channels, 1e-6, silu=False)
        self.conv_y = Conv2d(latent_channels, channels, 1)
        self.conv_b = Conv2d(latent_channels, channels, 1)
        self.silu = silu

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        latent = F.interpolate(latent, size=x.shape[2:], mode="nearest")
        x = self.norm_layer(x).mul_(self.conv_y(latent)).add_(self.conv_b(latent))
        return F.silu(x, inplace=True) if self.silu else x


class SpatialAttention(Attention):
    """Self-attention over the pixels of an image, with its norm and residual: (N, C, H, W) in and out."""

    place = -1  # among those of a UNet, for its cache

    def __init__(self, channels: int, head_dim: int, groups: int | None, eps: float, scale: float = 1.0,
                 latent_channels: int | None = None):
        super().__init__(channels, channels // head_dim, head_dim, bias=True)
        self.group_norm = None if groups is None else GroupNorm(groups, channels, eps, silu=False)
        if latent_channels is not None:
            self.spatial_norm = SpatialNorm(channels, latent_channels, silu=False)
        self.scale = scale

    def forward(self, x: Tensor, latent: Tensor | None = None,  # type: ignore[override]
                attend: Attend | None = None) -> Tensor:
        normed: Tensor | Quantized = x if latent is None else self.spatial_norm(x, latent)
        if self.group_norm is not None:
            normed = self.group_norm.into(self.entry, x)
        h = as_image(super().forward(as_tokens(normed), residual=as_tokens(x), attend=attend), *x.shape[2:])
        return h if self.scale == 1.0 else h.div_(self.scale)


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = GatedLinear(dim, 2 * inner)


class FeedForward(Direct):
    """net.2(GEGLU(net.0.proj(x))) plus the residual (Shazeer 2020)."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])

    @property
    def entry(self) -> GatedLinear:
        """The layer that takes the tokens."""
        return cast(GEGLU, self.net[0]).proj

    def forward(self, x: Tensor | Quantized, residual: Tensor) -> Tensor:
        first, _, last = self.net
        return last(cast(GEGLU, first).proj(x, codes=last.row_form or last.int8 is not None), residual)
