"""The blocks of a UNet: ResNet blocks with transformers or self-attention between them, built from a
BlockPlan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .direct import Direct
from .gemm import Conv2d, Linear
from .hooks import Hooks
from .layers import (
    Attention,
    Downsample,
    FeedForward,
    GroupNorm,
    KeysValues,
    LayerNorm,
    ResnetBlock,
    SpatialAttention,
    Upsample,
    as_image,
    as_tokens,
)
from .unet_config import BlockPlan, UNetPlan

if TYPE_CHECKING:
    from ..caches import Session


@dataclass(frozen=True)
class Step:
    """Everything about one evaluation that is not the sample, found by each block through its slot.

    times: (N, C) or (N, 2 C) time embedding of each ResNet block. prompts: keys and values of each
    cross-attention. prompt_bias, self_bias: (N, 1, 1, keys), added to the scores, or None.
    """

    times: tuple[Tensor, ...]
    prompts: tuple[KeysValues, ...] = ()
    prompt_bias: Tensor | None = None
    self_bias: Tensor | None = None
    cache: Session | None = None
    hooks: Hooks | None = None


class TransformerBlock(Direct):
    """Self-attention, cross-attention and feed-forward, each after a LayerNorm and with a residual.

    only_cross: the first attention sees the prompt, too. masked: whether it obeys the masks of the Step.
    """

    place = -1  # among the network's, for its cache

    def __init__(self, dim: int, heads: int, context_dim: int | None, only_cross: bool, masked: bool = True):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, heads, dim // heads, context_dim if only_cross else None)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, heads, dim // heads, context_dim)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)
        self.masked = masked

    def forward(self, x: Tensor, step: Step) -> Tensor:
        own: Any = self._modules
        attn1, attn2, ff = own["attn1"], own["attn2"], own["ff"]
        first = None if attn1.context_dim is None else step.prompts[attn1.slot]
        second = step.prompts[attn2.slot]
        self_bias, prompt_bias = (step.self_bias, step.prompt_bias) if self.masked else (None, None)
        attend = None
        if step.hooks is not None:
            if self.place in step.hooks.skipped:
                return x
            attend = None if first is not None else step.hooks.attend.get(self.place)
        if step.cache is None:
            x = attn1(own["norm1"].into(attn1.entry, x), first, self_bias, x, attend)
            x = attn2(own["norm2"].into(attn2.entry, x), second, prompt_bias, x)
            return ff(own["norm3"].into(ff.entry, x), x)
        kind, delta = "self" if first is None else "cross", step.cache.delta
        x = delta(kind, (self.place, 1), x,
                  lambda: attn1(own["norm1"].into(attn1.entry, x), first, self_bias, x, attend))
        x = delta("cross", (self.place, 2), x,
                  lambda: attn2(own["norm2"].into(attn2.entry, x), second, prompt_bias, x))
        return delta("mlp", self.place, x, lambda: ff(own["norm3"].into(ff.entry, x), x))


class Transformer2D(Direct):
    """GroupNorm, projection to tokens, transformer blocks, projection back, residual: (N, C, H, W) in and
    out."""

    def __init__(self, plan: UNetPlan, block: BlockPlan, depth: int, only_cross: bool, masked: bool = True):
        super().__init__()
        c = block.out_channels
        linear = plan.linear_projection and not plan.dual
        self.norm = GroupNorm(plan.groups, c, 1e-6, silu=False)
        self.proj_in = Linear(c, c) if linear else Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(c, block.heads, block.context_dim, only_cross, masked) for _ in range(depth))
        self.proj_out = Linear(c, c) if linear else Conv2d(c, c, 1)
        self.linear = linear

    def forward(self, x: Tensor, step: Step) -> Tensor:
        own: Any = self._modules
        proj_in, proj_out = own["proj_in"], own["proj_out"]
        normed, size = own["norm"].into(proj_in, x), x.shape[2:]
        h = proj_in(as_tokens(normed)) if self.linear else as_tokens(proj_in(normed))
        for block in own["transformer_blocks"]:
            h = block(h, step)
        if self.linear:
            return as_image(proj_out(h, as_tokens(x)), *size)
        return proj_out(as_image(h, *size), x)


class DualTransformer2D(Direct):
    """Two transformers, one for 77 text tokens, one for 257 image tokens; their outputs are averaged."""

    def __init__(self, plan: UNetPlan, block: BlockPlan):
        super().__init__()
        self.transformers = nn.ModuleList(
            Transformer2D(plan, block, 1, False, masked=False) for _ in range(2))
        for transformer, tokens in zip(self.transformers, (slice(77, 77 + 257), slice(0, 77))):
            for module in transformer.modules():
                if isinstance(module, Attention) and module.context_dim is not None:
                    module.context = tokens

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.transformers[1](x, step).add_(self.transformers[0](x, step)).mul_(0.5)


def _attention(plan: UNetPlan, block: BlockPlan, layer: int, groups: int, only_cross: bool) -> nn.Module:
    if block.kind == "attn":
        return SpatialAttention(block.out_channels, block.head_dim, groups, plan.eps, block.scale)
    if plan.dual:
        return DualTransformer2D(plan, block)
    return Transformer2D(plan, block, block.depths[layer], only_cross)


class _Block(Direct):
    """ResNet blocks with an attention after each, or without; ``resnets`` and ``attentions`` as in
    diffusers."""

    def __init__(self, plan: UNetPlan, block: BlockPlan, inputs: list[int]):
        super().__init__()
        self.kind = block.kind
        self.resnets = nn.ModuleList(
            ResnetBlock(c, block.out_channels, plan.block_time_dim, plan.groups, plan.eps, plan.scale_shift,
                        block.scale) for c in inputs)

    def add_attentions(self, plan: UNetPlan, block: BlockPlan, groups: int, only_cross: bool) -> None:
        if block.kind != "plain":
            self.attentions = nn.ModuleList(
                _attention(plan, block, i, groups, only_cross) for i in range(block.layers))

    def _resnets(self) -> Iterable[ResnetBlock]:
        return cast(Iterable[ResnetBlock], self.resnets)

    def beside(self) -> Iterable[nn.Module | None]:
        """The attention of each ResNet block, None in a plain block."""
        return repeat(None) if self.kind == "plain" else self.attentions

    def attend(self, attention: nn.Module | None, x: Tensor, step: Step) -> Tensor:
        if attention is None:
            return x
        if self.kind == "cross":
            return attention(x, step)
        if step.cache is None and step.hooks is None:
            return attention(x)
        place, attend = cast(SpatialAttention, attention).place, None
        if step.hooks is not None:
            if place in step.hooks.skipped:
                return x
            attend = step.hooks.attend.get(place)
        if step.cache is not None:
            return step.cache.delta("self", place, x, lambda: attention(x, attend=attend))
        return attention(x, attend=attend)

    def unit(self, number: int, x: Tensor, step: Step) -> Tensor:
        """One ResNet block with its attention."""
        resnet = cast(ResnetBlock, self.resnets[number])
        attention = None if self.kind == "plain" else self.attentions[number]
        return self.attend(attention, resnet(x, step.times[resnet.slot]), step)


class DownBlock(_Block):
    def __init__(self, plan: UNetPlan, block: BlockPlan):
        super().__init__(plan, block, [block.in_channels] + [block.out_channels] * (block.layers - 1))
        self.add_attentions(plan, block, plan.groups, block.only_cross_attention)
        self.downsamplers = nn.ModuleList(
            [Downsample(block.out_channels, plan.padding)] if block.resample else [])

    def forward(self, x: Tensor, step: Step, adapter: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Returns the output and the skip tensors. adapter: T2I-Adapter's residual of this level."""
        skips = []
        for resnet, attention in zip(self._resnets(), self.beside()):
            x = self.attend(attention, resnet(x, step.times[resnet.slot]), step)
            skips.append(x)
        if adapter is not None and self.kind == "cross":
            x = x + adapter
            skips[-1] = x
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        if adapter is not None and self.kind != "cross":
            x = x + adapter
            skips[-1] = x
        return x, skips


class MidBlock(_Block):
    def __init__(self, plan: UNetPlan, block: BlockPlan):
        super().__init__(plan, block, [block.in_channels] * (1 + block.layers))
        self.add_attentions(plan, block, plan.attention_groups, False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        first, *others = self._resnets()
        x = first(x, step.times[first.slot])
        for resnet, attention in zip(others, self.beside()):
            x = resnet(self.attend(attention, x, step), step.times[resnet.slot])
        return x


class UpBlock(_Block):
    def __init__(self, plan: UNetPlan, block: BlockPlan):
        firsts = [block.in_channels] + [block.out_channels] * (block.layers - 1)
        super().__init__(plan, block, [a + b for a, b in zip(firsts, block.skips)])
        self.add_attentions(plan, block, plan.groups, block.only_cross_attention)
        self.upsamplers = nn.ModuleList([Upsample(block.out_channels)] if block.resample else [])

    def forward(self, x: Tensor, skips: list[Tensor], step: Step, size: tuple[int, int] | None) -> Tensor:
        """Consumes skips from its end; size: of the next level's skips, None for twice the own."""
        for resnet, attention in zip(self._resnets(), self.beside()):
            x = resnet(torch.cat([x, skips.pop()], dim=1), step.times[resnet.slot])
            x = self.attend(attention, x, step)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x
