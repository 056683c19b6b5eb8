"""A UNet's forward with a cache: the same layers, cut where a cache may leave some of them out."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from .layers import ResnetBlock, SpatialAttention
from .segments import number_blocks
from .unet_blocks import DownBlock, Step, TransformerBlock, UpBlock

if TYPE_CHECKING:
    from ..caches import Session
    from .unet_trunk import UNetTrunk


def number_segments(model: nn.Module) -> None:
    """Gives every block that a cache may reuse its place in the network."""
    number_blocks(model, TransformerBlock, SpatialAttention)


def segments(model: nn.Module) -> tuple[str, ...]:
    """The kinds of segments of a UNet. "deep": what lies behind a skip connection; "self", "cross", "mlp": residuals
    of attention and feed-forward; "tail": all after the first ResNet block and its attention; "stack": all between the
    input and the output convolution."""
    blocks = [m for m in model.modules() if isinstance(m, TransformerBlock)]
    spatial = any(isinstance(m, SpatialAttention) for m in model.modules())
    crossing = ("cross", "mlp") if blocks else ()
    own = ("self",) if spatial or any(b.attn1.context_dim is None for b in blocks) else ()
    return ("deep", *own, *crossing, "tail", "stack", "output")


def run_cached(model: UNetTrunk, x: Tensor, step: Step, cache: Session) -> Tensor:
    """From the input convolution's output to the last norm's input, both (N, C, H, W)."""
    blocks = [cast(DownBlock, b) for b in model.down_blocks]
    downs = [(b, i) for b in blocks for i in range(len(b.resnets) + len(b.downsamplers))]
    first = cast(ResnetBlock, downs[0][0].resnets[0])

    def modulated() -> Tensor:
        time = step.times[first.slot][:, :, None, None]
        if not first.scale_shift:
            return first.norm1(x) + time
        gain, shift = time.chunk(2, dim=1)
        return first.norm1(x) * (1 + gain) + shift

    return cache.stack(x, lambda: _through(model, downs, x, None, step, cache), lambda: _down(downs[0], x, step),
                       lambda h: _through(model, downs, x, h, step, cache), modulated)


def _through(model: UNetTrunk, downs: list[tuple[DownBlock, int]], x: Tensor, second: Tensor | None, step: Step,
             cache: Session) -> Tensor:
    """second: the second skip tensor, where it is there already."""
    ups = [(cast(UpBlock, b), i) for b in model.up_blocks for i in range(len(cast(nn.ModuleList, b.resnets)))]
    branch = min(cache.branch, len(downs))
    skips = [x]
    for j in range(branch):
        skips.append(second if j == 0 and second is not None else _down(downs[j], skips[-1], step))
    shallow = len(ups) - branch - 1  # the first up layer that takes one of these skips

    def deep() -> Tensor:
        inner = list(skips)
        for j in range(branch, len(downs)):
            inner.append(second if j == 0 and second is not None else _down(downs[j], inner[-1], step))
        h = inner[-1] if model.mid_block is None else model.mid_block(inner[-1], step)
        for block, i in ups[:shallow]:
            h = _up(block, i, h, inner, step)
        return h

    h = cache.value("deep", 0, deep)
    for block, i in ups[shallow:]:
        h = _up(block, i, h, skips, step)
    return h


def _down(unit: tuple[DownBlock, int], x: Tensor, step: Step) -> Tensor:
    block, i = unit
    return block.unit(i, x, step) if i < len(block.resnets) else block.downsamplers[0](x)


def _up(block: UpBlock, i: int, x: Tensor, skips: list[Tensor], step: Step) -> Tensor:
    """Consumes a skip tensor; the last layer of a block goes on to the size of the next one."""
    x = block.unit(i, torch.cat([x, skips.pop()], dim=1), step)
    if i + 1 == len(block.resnets):
        for upsample in block.upsamplers:
            x = upsample(x, tuple(skips[-1].shape[2:]) if skips else None)
    return x
