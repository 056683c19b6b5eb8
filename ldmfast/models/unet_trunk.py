"""The U of a UNet: convolution in, down with skips, middle, up, convolution out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import LdmfastError, ShapeError
from .base import Config, Model
from .gemm import Conv2d, Linear
from .layers import Embedding, GroupNorm, TimestepEmbedding, by_rows, channels_last, timestep_embedding
from .unet_blocks import DownBlock, MidBlock, Step, UpBlock
from .unet_cached import number_segments, run_cached, segments
from .unet_config import UNetPlan
from .unet_state import Places


class UNetTrunk(Model):
    """Everything that UNet2DCondition and UNet2D share: the blocks, and the embedding of time and class."""

    def __init__(self, config: Config, kernels: tuple[int, int] = (3, 3)):
        super().__init__(config)
        c = self.config
        plan: UNetPlan = c.plan()
        first = c.block_out_channels[0]
        self.conv_in = Conv2d(c.in_channels, first, kernels[0], padding=(kernels[0] - 1) // 2)
        self.time_embedding = TimestepEmbedding(first, plan.time_dim, getattr(c, "time_cond_proj_dim", None),
                                                getattr(c, "timestep_post_act", None))
        self.class_embedding = self._class_embedding(plan)
        self.down_blocks = nn.ModuleList(DownBlock(plan, block) for block in plan.down)
        self.mid_block = None if plan.mid is None else MidBlock(plan, plan.mid)
        self.up_blocks = nn.ModuleList(UpBlock(plan, block) for block in plan.up)
        self.conv_norm_out = GroupNorm(plan.groups, first, plan.eps)
        self.conv_out = Conv2d(first, c.out_channels, kernels[1], padding=(kernels[1] - 1) // 2)
        self.places = Places(self)
        number_segments(self)
        self.segments = segments(self)

    def _class_embedding(self, plan: UNetPlan) -> nn.Module | None:
        c, kind = self.config, self.config.class_embed_type
        if kind is None:
            return None if c.num_class_embeds is None else Embedding(c.num_class_embeds, plan.time_dim)
        if kind == "timestep":
            return TimestepEmbedding(c.block_out_channels[0], plan.time_dim)
        if kind == "identity":
            return nn.Identity()
        kinds = {"projection": TimestepEmbedding, "simple_projection": Linear}
        return kinds[kind](c.projection_class_embeddings_input_dim, plan.time_dim)

    def embed_time(self, timesteps: list[float], condition: Tensor | None = None) -> Tensor:
        """Timesteps -> (timesteps, 1 or pictures, D). condition (pictures, K): guidance embedding (LCM)."""
        c = self.config
        t = torch.tensor(timesteps, dtype=torch.float64, device=self.device)
        waves = timestep_embedding(t, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)
        x = waves.to(self.dtype)[:, None]
        if condition is not None and self.time_embedding.cond_proj is not None:
            x = x + by_rows(self.time_embedding.cond_proj, condition.to(self.dtype))
        return self.time_embedding(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def embed_class(self, labels: Tensor | None) -> Tensor | None:
        """Class labels (pictures,) or (pictures, K) -> (pictures, D), or None for a model without classes."""
        c = self.config
        if self.class_embedding is None:
            return None
        if labels is None:
            raise ShapeError("this model is class-conditional: pass class_labels, one for each picture")
        if c.class_embed_type == "timestep":
            labels = timestep_embedding(labels.reshape(-1), c.block_out_channels[0], c.flip_sin_to_cos,
                                        c.freq_shift)
        if c.class_embed_type is None:
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < c.num_class_embeds:
                raise ShapeError(f"class_labels reach {int(labels.min())}..{int(labels.max())}, the model "
                                 "has "
                                 f"classes 0..{c.num_class_embeds - 1}")
            return self.class_embedding(labels.reshape(-1))
        if c.class_embed_type == "simple_projection":
            return by_rows(self.class_embedding, labels.to(self.dtype))
        return self.class_embedding(labels.to(self.dtype))

    def check_sample(self, sample: Tensor) -> None:
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ShapeError(f"sample has shape {tuple(sample.shape)}, needs (pictures, "
                             f"{self.config.in_channels}, height, width)")

    def run(self, sample: Tensor, step: Step, controls: Sequence[Tensor] | None = None,
            mid_control: Tensor | None = None, adapters: Sequence[Tensor] | None = None) -> Tensor:
        """(N, in, H, W) -> (N, out, H, W), any H and W. controls, mid_control: ControlNet's residuals of
        every skip and of the middle; adapters: T2I-Adapter's residuals of the levels.
        """
        waiting = list(adapters or ())
        x = channels_last(sample.to(cast(Tensor, self.conv_in.bias).dtype))
        x = self.conv_in(2 * x - 1 if self.config.center_input_sample else x)
        if step.cache is not None:
            if any(c is not None for c in (controls, mid_control, adapters)):
                raise LdmfastError("residuals of ControlNet or T2I-Adapter and a cache were given; give one of the two")
            return self.conv_norm_out.conv(self.conv_out, run_cached(self, x, step, step.cache))
        skips = [x]
        for down in self.down_blocks:
            x, new = down(x, step, waiting.pop(0) if waiting else None)
            skips += new
        if controls is not None:
            _same_shapes("down_block_additional_residuals", skips, controls)
            skips = [skip + control.to(skip) for skip, control in zip(skips, controls)]
        if self.mid_block is not None:
            x = self.mid_block(x, step)
            if waiting and waiting[0].shape == x.shape:
                x = x + waiting.pop(0)
        if mid_control is not None:
            _same_shapes("mid_block_additional_residual", [x], [mid_control])
            x = x + mid_control.to(x)
        for up in self.up_blocks:
            below = len(skips) - len(cast(UpBlock, up).resnets)
            x = up(x, skips, step, tuple(skips[below - 1].shape[2:]) if below > 0 else None)
        return self.conv_norm_out.conv(self.conv_out, x)


def _same_shapes(name: str, own: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    if [tuple(x.shape) for x in own] != [tuple(x.shape) for x in given]:
        pairs = [(tuple(a.shape), tuple(b.shape)) for a, b in zip(own, given) if a.shape != b.shape]
        detail = f"shape {pairs[0][1]} where {pairs[0][0]} is needed" if pairs else "the number differs"
        raise ShapeError(f"{name}: {len(given)} tensors for {len(own)} places, {detail}")
