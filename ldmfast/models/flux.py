"""FluxTransformer2D: the denoiser of FLUX.1 (dev, schnell, Fill, Depth, Canny)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import CheckpointError, LdmfastError, ShapeError
from ..torch_modes import own_modes
from .base import Config, Model, unsupported
from .direct import Direct
from .gemm import Linear
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
    rotary,
)
from .linears import GeluLinear, SplitLinear
from .segments import number_blocks, through
from .single_file import FromSingleFile
from .unet_state import as_list

if TYPE_CHECKING:
    from ..caches import Session


@dataclass(frozen=True)
class FluxTransformer2DConfig(Config):
    """config.json of diffusers' FluxTransformer2DModel. in_channels counts those of a 2x2 patch of latents, and of what
    is given beside them (Fill, Depth)."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def check(self) -> None:
        for key in ("patch_size", "in_channels", "attention_head_dim", "num_attention_heads"):
            if not getattr(self, key):
                raise unsupported(key, getattr(self, key), "a positive number")
        axes = self.axes_dims_rope
        if sum(axes) != self.attention_head_dim or any(a % 2 for a in axes):
            raise CheckpointError(f"config key 'axes_dims_rope' = {list(axes)} must be even numbers with the sum "
                                  f"attention_head_dim = {self.attention_head_dim}")

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class DoubleBlock(Direct):
    """Text and image, each with weights of its own, meet in the attention."""

    place = -1  # among the network's, for its cache

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1, self.norm1_context = Modulation(dim, 6), Modulation(dim, 6)
        self.attn = JointAttention(dim, heads, head_dim)
        self.ff, self.ff_context = GeluFeedForward(dim), GeluFeedForward(dim)

    def forward(self, x: Tensor, text: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        rows, text_rows = (step.rows[m.slot].unbind(1) for m in (self.norm1, self.norm1_context))
        cache, place = step.cache, self.place
        frozen = None if cache is None else cache.reuses("text", place)  # q, k and v of the text
        keep = None if cache is None else partial(cache.keep, "text", place)

        def attend() -> Any:
            image_in, = modulated(x, rows[0], rows[1], self.attn.entry)
            if frozen is not None:
                return self.attn.beside(image_in, frozen, step.rope)
            text_in, = modulated(text, text_rows[0], text_rows[1], self.attn.text_entry)
            return self.attn(image_in, text_in, step.rope, keep)

        if frozen is not None and cache is not None:
            x = gated(x, rows[2], cache.value("self", (place, "image"), attend))
            return _feed_forward(x, rows, self.ff, cache, (place, "image")), text
        image_out, text_out = attend() if cache is None else cache.value("self", place, attend)
        return (_feed_forward(gated(x, rows[2], image_out), rows, self.ff, cache, (place, "image")),
                _feed_forward(gated(text, text_rows[2], text_out), text_rows, self.ff_context, cache, (place, "text")))


def _feed_forward(x: Tensor, rows: Sequence[Tensor], ff: GeluFeedForward, cache: Session | None, place: Hashable,
                  ) -> Tensor:
    shift, scale, gate = rows[3:]

    def feed() -> Tensor:
        return ff(modulated(x, shift, scale, ff.entry)[0])

    return gated(x, gate, feed() if cache is None else cache.value("mlp", place, feed))


class SingleBlock(Direct):
    """Attention and feed-forward side by side, of text and image as one sequence."""

    place = -1  # among the network's, for its cache

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.proj_mlp = GeluLinear(dim, 4 * dim)
        self.proj_out = SplitLinear(5 * dim, dim)
        self.attn = JointAttention(dim, heads, head_dim, text=False, out=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        cache, place = step.cache, self.place
        if cache is None:
            return self._around(x, step, lambda y: self.attn.alone(y, step.rope))

        def keep(qkv: Tensor) -> None:
            cache.keep("text", place, qkv[:, :step.text.shape[1]])

        def attend(y: Any) -> Tensor:
            return self.attn.alone(y, step.rope, keep)

        if cache.decides("single"):
            return self._around(x, step, attend, lambda out: cache.value("single", place, out))
        return self._around(x, step, lambda y: cache.value("self", ("single", place), lambda: attend(y)))

    def beside(self, x: Tensor, text_qkv: Tensor, step: Step) -> Tensor:
        """The image's tokens alone, (N, T, C), beside text whose q, k and v are given."""
        return self._around(x, step, lambda y: self.attn.beside(y, text_qkv, step.rope))

    def _around(self, x: Tensor, step: Step, attend: Callable[[Any], Tensor],
                value: Callable[[Callable[[], Tensor]], Tensor] | None = None) -> Tensor:
        shift, scale, gate = step.rows[self.norm.slot].unbind(1)

        def compute() -> Tensor:
            for_attention, for_mlp = modulated(x, shift, scale, self.attn.entry, self.proj_mlp)
            return self.proj_out((attend(for_attention), self.proj_mlp(for_mlp)))

        return gated(x, gate, compute() if value is None else value(compute))


class FluxTransformer2D(FromSingleFile, Model):
    """FLUX.1 (Black Forest Labs 2024): blocks of two streams, then of one (after Dehghani et al. 2023, section 2), with
    rotary positions. Inference only, thread-safe: what depends on the call is in the ``JointState`` of prepare()."""

    config_class = FluxTransformer2DConfig
    part = "transformer"
    segments = ("self", "mlp", "single", "text", "tail", "stack", "output")

    def __init__(self, config: FluxTransformer2DConfig):
        super().__init__(config)
        c, dim = config, config.inner_dim
        shape = (dim, c.num_attention_heads, c.attention_head_dim)
        self.time_text_embed = TimeTextEmbedding(dim, c.pooled_projection_dim, c.guidance_embeds)
        self.context_embedder = Linear(c.joint_attention_dim, dim)
        self.x_embedder = Linear(c.in_channels, dim)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(*shape) for _ in range(c.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(*shape) for _ in range(c.num_single_layers))
        number_blocks(self, DoubleBlock, SingleBlock)
        self.norm_out = Modulation(dim, 2)
        self.proj_out = Linear(dim, c.patch_size ** 2 * (c.out_channels or c.in_channels))
        self.modulations = Modulations(self)

    @own_modes()
    def prepare(self, timesteps: Tensor | Sequence[float] | float, encoder_hidden_states: Tensor | None = None, *,
                pooled_projections: Tensor | None = None, img_ids: Tensor | None = None,
                txt_ids: Tensor | None = None, guidance: Tensor | None = None) -> JointState:
        """Computes what does not depend on the sample, for all timesteps of a call at once.

        timesteps: from 0 to 1, as diffusers gives them to this model. encoder_hidden_states: (N, T,
        joint_attention_dim). pooled_projections: (N, pooled_projection_dim). img_ids, txt_ids: (tokens, axes) positions
        of the image's and the text's tokens. guidance: (N,), the scale, for a model with a guidance embedding.
        The result equals, bit for bit, what forward() computes from the same conditions. Raises ShapeError.
        """
        c, times = self.config, distinct(timesteps)
        prompt, pooled = check_conditions(encoder_hidden_states, pooled_projections, c.joint_attention_dim,
                                          c.pooled_projection_dim)
        if c.guidance_embeds and (guidance is None or tuple(guidance.shape) not in ((1,), (len(prompt),))):
            raise ShapeError(f"guidance has shape {None if guidance is None else tuple(guidance.shape)}, this model "
                             f"needs ({len(prompt)},)")
        if guidance is not None and not c.guidance_embeds:
            raise ShapeError("guidance was given, this model has no guidance embedding; leave it out")
        ids = torch.cat([self._ids("txt_ids", txt_ids, prompt.shape[1]), self._ids("img_ids", img_ids)])
        t = torch.tensor(times, dtype=torch.float64, device=self.device)
        guidance = None if guidance is None else guidance.float() * 1000
        embedding = self.time_text_embed(t * 1000, pooled.to(self.dtype), guidance)
        return JointState({t: i for i, t in enumerate(times)}, self.modulations.project(embedding),
                          self.context_embedder(prompt.to(self.dtype)), rotary(ids.to(self.device), c.axes_dims_rope))

    def _ids(self, name: str, ids: Tensor | None, tokens: int | None = None) -> Tensor:
        ids = ids[0] if ids is not None and ids.ndim == 3 else ids  # diffusers' older form, one of a batch
        axes = len(self.config.axes_dims_rope)
        if ids is None or ids.ndim != 2 or ids.shape[1] != axes or tokens not in (None, len(ids)):
            raise ShapeError(f"{name} has shape {None if ids is None else tuple(ids.shape)}, needs "
                             f"({'tokens' if tokens is None else tokens}, {axes})")
        return ids.float()

    @own_modes()
    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor | None = None,
                pooled_projections: Tensor | None = None, img_ids: Tensor | None = None, txt_ids: Tensor | None = None,
                guidance: Tensor | None = None, *, state: JointState | None = None,
                joint_attention_kwargs: dict[str, Any] | None = None,
                controlnet_block_samples: Sequence[Tensor] | None = None,
                controlnet_single_block_samples: Sequence[Tensor] | None = None,
                controlnet_blocks_repeat: bool = False, cache: Session | None = None) -> Tensor:
        """The predicted velocity (N, image tokens, channels).

        sample: (N, image tokens, in_channels), latents in 2x2 patches. timestep: number, or tensor () or (N,), from 0
        to 1. With ``state`` from prepare() no conditions are given; without it they are the arguments of prepare().
        controlnet_*: residuals (N, image tokens, D), spread over the blocks (controlnet_blocks_repeat: in turn).
        cache: of this call (ldmfast.caches).
        Raises ShapeError for sizes that do not fit, LdmfastError for contradicting arguments.
        """
        check_kwargs(joint_attention_kwargs)
        if sample.ndim != 3 or sample.shape[2] != self.config.in_channels:
            raise ShapeError(f"sample has shape {tuple(sample.shape)}, needs (pictures, tokens, "
                             f"{self.config.in_channels})")
        given = (encoder_hidden_states, pooled_projections, img_ids, txt_ids, guidance)
        if state is None:
            state = self.prepare(timestep, encoder_hidden_states, pooled_projections=pooled_projections,
                                 img_ids=img_ids, txt_ids=txt_ids, guidance=guidance)
        elif any(x is not None for x in given):
            raise LdmfastError("conditions were given together with a prepared state, which holds its own; give one of "
                               "the two")
        if sample.shape[1] != state.tokens:
            raise ShapeError(f"sample has {sample.shape[1]} tokens, img_ids has positions for {state.tokens}")
        step = state.step(timestep, len(sample))._replace(cache=cache)
        return self.at(as_list(timestep)).run(sample, step, controlnet_block_samples, controlnet_single_block_samples,
                                              controlnet_blocks_repeat)

    def run(self, sample: Tensor, step: Step, controls: Sequence[Tensor] | None = None,
            single_controls: Sequence[Tensor] | None = None, repeat: bool = False) -> Tensor:
        text = step.text
        x = self.x_embedder(sample.to(text.dtype))
        first = x

        def double(i: int, block: DoubleBlock, x: Tensor) -> Tensor:
            nonlocal text
            x, text = block(x, text, step)
            return x if controls is None else x + _control(controls, i, len(self.transformer_blocks), repeat, x)

        doubles = cast(Sequence[DoubleBlock], self.transformer_blocks)
        blocks = [partial(double, i, block) for i, block in enumerate(doubles)]
        indicator = None
        if doubles:
            rows = step.rows[doubles[0].norm1.slot]
            indicator = partial(ops.layer_norm_modulate, first, rows[:, 1], rows[:, 0], eps=EPS)
        x = through([*blocks, lambda x: self._singles(x, text, step, single_controls)], x, step.cache, indicator)
        scale, shift = step.rows[self.norm_out.slot].unbind(1)
        return cast(Tensor, self.proj_out(*modulated(x, shift, scale, self.proj_out)))

    def _singles(self, x: Tensor, text: Tensor, step: Step, controls: Sequence[Tensor] | None) -> Tensor:
        """The blocks of one stream: the image's tokens after them, a view."""
        blocks = cast(Sequence[SingleBlock], self.single_transformer_blocks)
        frozen = [None if step.cache is None else step.cache.reuses("text", b.place) for b in blocks]
        if blocks and frozen[0] is not None:
            for block, text_qkv in zip(blocks, frozen):
                x = block.beside(x, cast(Tensor, text_qkv), step)
            return x
        cut = text.shape[1]
        both = torch.cat([text, x], dim=1)
        for i, block in enumerate(blocks):
            both = block(both, step)
            if controls is not None:
                both[:, cut:] += _control(controls, i, len(blocks), False, both[:, cut:])
        return both[:, cut:]


def _control(controls: Sequence[Tensor], block: int, blocks: int, repeat: bool, x: Tensor) -> Tensor:
    """ControlNet's residual for a block."""
    control = controls[block % len(controls) if repeat else block // math.ceil(blocks / len(controls))]
    if control.shape != x.shape:
        raise ShapeError(f"controlnet samples: shape {tuple(control.shape)} where {tuple(x.shape)} is needed")
    return control.to(x)
