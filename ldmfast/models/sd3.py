"""SD3Transformer2D: the denoiser of Stable Diffusion 3 and 3.5, a transformer over text and image tokens."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import CheckpointError, LdmfastError, ShapeError
from ..torch_modes import own_modes
from .base import Config, Model, unsupported
from .direct import Direct
from .gemm import Linear
from .hooks import Attend, Hooks
from .joint_blocks import (
    EPS,
    GeluFeedForward,
    JointAttention,
    JointState,
    Modulation,
    Modulations,
    Step,
    TimeTextEmbedding,
    check_conditions,
    check_kwargs,
    distinct,
    gated,
    modulated,
)
from .segments import number_blocks, through
from .single_file import FromSingleFile
from .unet_state import as_list

if TYPE_CHECKING:
    from ..caches import Session


@dataclass(frozen=True)
class SD3Transformer2DConfig(Config):
    """config.json of diffusers' SD3Transformer2DModel. Sizes are in latents, pos_embed_max_size in patches."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    choices: ClassVar = {"qk_norm": (None, "rms_norm")}

    def check(self) -> None:
        for key in ("patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
                    "pos_embed_max_size"):
            if not getattr(self, key):
                raise unsupported(key, getattr(self, key), "a positive number")
        if self.caption_projection_dim != self.inner_dim:
            raise CheckpointError(f"config key 'caption_projection_dim' = {self.caption_projection_dim} is not the "
                                  f"width of the blocks, {self.num_attention_heads} heads of {self.attention_head_dim}")
        if self.pos_embed_max_size ** 2 * self.inner_dim > 1 << 28:
            raise unsupported("pos_embed_max_size", self.pos_embed_max_size, "fewer positions (SD 3.5: 384)")

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class PatchEmbed(nn.Module):
    """Patches to tokens, plus the middle part of a table of position embeddings that is larger than any picture.

    The table, (1, size * size, D), comes with the weights.
    """

    pos_embed: Tensor

    def __init__(self, channels: int, dim: int, patch: int, size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)
        self.patch, self.size = patch, size
        self.register_buffer("pos_embed", torch.zeros(1, size * size, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, H // patch * W // patch, D); what is left over at the lower and right edge is cut."""
        p, n = self.patch, self.size
        h, w = x.shape[2] // p, x.shape[3] // p
        if h > n or w > n:
            raise ShapeError(f"sample has {h}x{w} patches of {p}x{p} latents, this model knows positions for {n}x{n}")
        patches = x[:, :, :h * p, :w * p].reshape(*x.shape[:2], h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        top, left = (n - h) // 2, (n - w) // 2
        places = self.pos_embed.view(n, n, -1)[top:top + h, left:left + w].reshape(h * w, -1)
        patches = patches.reshape(len(x), h * w, x.shape[1] * p * p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias).add_(places)


class JointBlock(Direct):
    """Attention of both streams together, then a feed-forward of each, all modulated by the time (Esser et al. 2024,
    figure 2b). dual: another attention, of the image alone (SD 3.5 medium). last: the text ends here."""

    place = -1  # among the network's, for its cache

    def __init__(self, config: SD3Transformer2DConfig, dual: bool, last: bool):
        super().__init__()
        dim, heads, head_dim = config.inner_dim, config.num_attention_heads, config.attention_head_dim
        norm = config.qk_norm is not None
        self.last = last
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, heads, head_dim, text_out=not last, qk_norm=norm)
        self.attn2 = JointAttention(dim, heads, head_dim, text=False, qk_norm=norm) if dual else None
        self.ff = GeluFeedForward(dim)
        self.ff_context = None if last else GeluFeedForward(dim)

    def forward(self, x: Tensor, text: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        rows, text_rows = (step.rows[m.slot].unbind(1) for m in (self.norm1, self.norm1_context))
        shift, scale, gate, shift_ff, scale_ff, gate_ff = rows[:6]
        if self.last:
            text_rows = text_rows[::-1]  # AdaLayerNormContinuous has the scale first
        cache, place = step.cache, self.place
        frozen = None if cache is None else cache.reuses("text", place)  # q, k and v of the text
        keep = None if cache is None else partial(cache.keep, "text", place)
        own = None if step.hooks is None else step.hooks.attend.get(place)

        def attend() -> Any:
            image_in, = modulated(x, shift, scale, self.attn.entry)
            if frozen is not None:
                return self.attn.beside(image_in, frozen, attend=own)
            text_in, = modulated(text, text_rows[0], text_rows[1], self.attn.text_entry)
            return self.attn(image_in, text_in, keep=keep, attend=own)

        if frozen is not None and cache is not None:
            image_out, text_out = cache.value("self", (place, "image"), attend), None
        else:
            image_out, text_out = attend() if cache is None else cache.value("self", place, attend)
        if self.attn2 is not None:
            x = gated(x, rows[8], self._second(x, rows, cache, own))
        x = gated(x, gate, image_out)
        x = gated(x, gate_ff, _feed(self.ff, x, shift_ff, scale_ff, cache, (place, "image")))
        if self.ff_context is None or frozen is not None:
            return x, text
        gate, shift_ff, scale_ff, gate_ff = text_rows[2:]
        text = gated(text, gate, cast(Tensor, text_out))
        return x, gated(text, gate_ff, _feed(self.ff_context, text, shift_ff, scale_ff, cache, (place, "text")))

    def _second(self, x: Tensor, rows: Sequence[Tensor], cache: Session | None, own: Attend | None) -> Tensor:
        attn = cast(JointAttention, self.attn2)

        def attend() -> Tensor:
            return attn.alone(modulated(x, rows[6], rows[7], attn.entry)[0], attend=own)

        return attend() if cache is None else cast(Tensor, cache.value("self", (self.place, "second"), attend))


def _feed(ff: GeluFeedForward, x: Tensor, shift: Tensor, scale: Tensor, cache: Session | None, place: Hashable,
          ) -> Tensor:
    def feed() -> Tensor:
        return ff(modulated(x, shift, scale, ff.entry)[0])

    return feed() if cache is None else cast(Tensor, cache.value("mlp", place, feed))


class SD3Transformer2D(FromSingleFile, Model):
    """Esser et al. 2024, "Scaling Rectified Flow Transformers", section 4. Inference only, thread-safe: what depends on
    the call is in the ``JointState`` that prepare() returns."""

    config_class = SD3Transformer2DConfig
    part = "transformer"
    segments = ("self", "mlp", "text", "tail", "stack", "output")

    def __init__(self, config: SD3Transformer2DConfig):
        super().__init__(config)
        c, dim = config, config.inner_dim
        self.pos_embed = PatchEmbed(c.in_channels, dim, c.patch_size, c.pos_embed_max_size)
        self.time_text_embed = TimeTextEmbedding(dim, c.pooled_projection_dim)
        self.context_embedder = Linear(c.joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(c, i in c.dual_attention_layers, i == c.num_layers - 1) for i in range(c.num_layers))
        number_blocks(self, JointBlock)
        self.norm_out = Modulation(dim, 2)
        self.out_channels = c.out_channels or c.in_channels
        self.proj_out = Linear(dim, c.patch_size ** 2 * self.out_channels)
        self.modulations = Modulations(self)

    @own_modes()
    def prepare(self, timesteps: Tensor | Sequence[float] | float, encoder_hidden_states: Tensor | None = None, *,
                pooled_projections: Tensor | None = None) -> JointState:
        """Computes what does not depend on the sample, for all timesteps of a call at once.

        encoder_hidden_states: (N, T, joint_attention_dim). pooled_projections: (N, pooled_projection_dim). The result
        equals, bit for bit, what forward() computes from the same conditions. Raises ShapeError.
        """
        c, times = self.config, distinct(timesteps)
        prompt, pooled = check_conditions(encoder_hidden_states, pooled_projections, c.joint_attention_dim,
                                          c.pooled_projection_dim)
        t = torch.tensor(times, dtype=torch.float64, device=self.device)
        embedding = self.time_text_embed(t, pooled.to(self.dtype))
        return JointState({t: i for i, t in enumerate(times)}, self.modulations.project(embedding),
                          self.context_embedder(prompt.to(self.dtype)))

    @own_modes()
    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor | None = None,
                pooled_projections: Tensor | None = None, *, state: JointState | None = None,
                block_controlnet_hidden_states: Sequence[Tensor] | None = None,
                joint_attention_kwargs: dict[str, Any] | None = None,
                skip_layers: Sequence[int] | None = None, cache: Session | None = None,
                hooks: Hooks | None = None) -> Tensor:
        """The predicted velocity (N, out_channels, H, W), channels-last, H and W rounded down to whole patches.

        sample: (N, in_channels, H, W). timestep: number, or tensor () or (N,). With ``state`` from prepare() no
        conditions are given; without it they are the arguments of prepare(). block_controlnet_hidden_states: one
        (N, patches, D) or several, spread over the blocks. skip_layers: blocks that are left out (skip-layer guidance).
        cache, hooks: of this call (ldmfast.caches, ldmfast.guidance). Raises ShapeError for sizes that do not fit,
        LdmfastError for contradicting arguments.
        """
        check_kwargs(joint_attention_kwargs)
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ShapeError(f"sample has shape {tuple(sample.shape)}, needs (pictures, {self.config.in_channels}, "
                             "height, width)")
        if state is None:
            state = self.prepare(timestep, encoder_hidden_states, pooled_projections=pooled_projections)
        elif encoder_hidden_states is not None or pooled_projections is not None:
            raise LdmfastError("conditions were given together with a prepared state, which holds its own; give one of "
                               "the two")
        step = state.step(timestep, len(sample))._replace(cache=cache, hooks=hooks)
        skipped = frozenset(skip_layers or ()) | (frozenset() if hooks is None else hooks.skipped)
        return self.at(as_list(timestep)).run(sample, step, block_controlnet_hidden_states, skipped)

    def run(self, sample: Tensor, step: Step, controls: Sequence[Tensor] | None = None,
            skipped: frozenset[int] = frozenset()) -> Tensor:
        p = self.config.patch_size
        h, w = sample.shape[2] // p, sample.shape[3] // p
        x, text = self.pos_embed(sample.to(step.text.dtype)), step.text
        blocks = cast(Sequence[JointBlock], self.transformer_blocks)

        def advance(i: int, block: JointBlock, x: Tensor) -> Tensor:
            nonlocal text
            if i not in skipped:
                x, text = block(x, text, step)
            return x if controls is None or block.last else x + _control(controls, i, len(blocks), x)

        rows = step.rows[blocks[0].norm1.slot]
        x = through([partial(advance, i, block) for i, block in enumerate(blocks)], x, step.cache,
                    lambda: ops.layer_norm_modulate(x, rows[:, 1], rows[:, 0], eps=EPS))
        scale, shift = step.rows[self.norm_out.slot].unbind(1)
        patches = self.proj_out(*modulated(x, shift, scale, self.proj_out))
        patches = patches.view(len(x), h, w, p, p, self.out_channels).permute(0, 1, 3, 2, 4, 5)
        return patches.reshape(len(x), h * p, w * p, self.out_channels).permute(0, 3, 1, 2)


def _control(controls: Sequence[Tensor], block: int, blocks: int, x: Tensor) -> Tensor:
    """ControlNet's residual for a block: they are spread evenly."""
    control = controls[int(block / (blocks / len(controls)))]
    if control.shape != x.shape:
        raise ShapeError(f"block_controlnet_hidden_states: shape {tuple(control.shape)} where {tuple(x.shape)} is "
                         "needed")
    return control.to(x)
