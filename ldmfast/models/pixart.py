"""PixArt alpha and sigma: the text-conditional diffusion transformer with one shared adaLN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import CheckpointError, LdmfastError, ShapeError
from ..torch_modes import own_modes
from .base import Config, Model
from .direct import Direct
from .dit import check_sizes
from .gemm import Linear
from .hooks import Hooks
from .layers import by_rows
from .segments import number_blocks, through
from .single_file import FromSingleFile
from .transformer_blocks import Block, LayerNorm, PatchEmbed, Sinusoids, Span, Step, TransformerState, unpatchify
from .unet_state import as_list, mask_bias

if TYPE_CHECKING:
    from ..caches import Session


@dataclass(frozen=True)
class PixArtConfig(Config):
    """config.json of diffusers' PixArtTransformer2DModel. use_additional_conditions None: the micro-conditions
    (resolution and aspect ratio) are there where sample_size is 128. interpolation_scale None: sample_size // 64."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    cross_attention_dim: int | None = 1152
    attention_bias: bool = True
    sample_size: int = 128
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None

    choices: ClassVar = {"norm_type": ("ada_norm_single",), "activation_fn": ("gelu-approximate", "gelu", "geglu"),
                         "attention_type": ("default", None)}
    inert: ClassVar = frozenset({"dropout", "norm_num_groups", "num_embeds_ada_norm", "upcast_attention"})

    def check(self) -> None:
        check_sizes(self)
        if self.caption_channels is not None and self.cross_attention_dim not in (None, self.channels):
            raise CheckpointError(f"config keys 'caption_channels' and 'cross_attention_dim' = "
                                  f"{self.cross_attention_dim} do not fit: projected captions have {self.channels} "
                                  "channels")
        if self.micro and self.channels % 3:
            raise CheckpointError(f"config key 'use_additional_conditions' needs a width that is a multiple of 3, not "
                                  f"{self.channels}")

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def micro(self) -> bool:
        """Whether resolution and aspect ratio are conditions."""
        return self.sample_size == 128 if self.use_additional_conditions is None else self.use_additional_conditions

    @property
    def stretch(self) -> float:
        """What positions are divided by."""
        return max(self.sample_size // 64, 1) if self.interpolation_scale is None else self.interpolation_scale


class _Embedder(nn.Module):
    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.timestep_embedder = Sinusoids(config.channels, 0)
        if config.micro:
            self.resolution_embedder = Sinusoids(config.channels // 3, 0)
            self.aspect_ratio_embedder = Sinusoids(config.channels // 3, 0)


class _AdaLayerNormSingle(nn.Module):
    def __init__(self, config: PixArtConfig):
        super().__init__()
        self.emb = _Embedder(config)
        self.linear = Linear(config.channels, 6 * config.channels)


class _CaptionProjection(Direct):
    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.linear_1 = Linear(in_channels, channels)
        self.linear_2 = Linear(channels, channels)

    def forward(self, caption: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(caption), approximate="tanh"))


class _Block(Block):
    def __init__(self, config: PixArtConfig):
        c = config
        super().__init__(c.channels, c.num_attention_heads, c.activation_fn, c.attention_bias, c.cross_attention_dim)
        self.norm1, self.norm2 = (LayerNorm(c.channels, c.norm_eps, c.norm_elementwise_affine) for _ in range(2))
        self.scale_shift_table = nn.Parameter(torch.randn(6, c.channels) / c.channels**0.5)

    def norms(self) -> tuple[LayerNorm, LayerNorm]:
        return self.norm1, self.norm2


class PixArt(FromSingleFile, Model):
    """Chen et al. 2023 (alpha) and 2024 (sigma). Inference only, thread-safe: nothing is written to the module; what
    depends on the call is in the ``TransformerState`` that prepare() returns.
    """

    config_class = PixArtConfig
    part = "transformer"
    segments: tuple[str, ...] = ("self", "mlp", "tail", "stack", "output")

    def __init__(self, config: PixArtConfig):
        super().__init__(config)
        c, channels = config, config.channels
        self.pos_embed = PatchEmbed(c.in_channels, channels, c.patch_size, c.sample_size, c.stretch)
        self.transformer_blocks = nn.ModuleList(_Block(c) for _ in range(c.num_layers))
        self.norm_out = LayerNorm(channels, 1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)
        self.proj_out = Linear(channels, c.patch_size**2 * (c.out_channels or c.in_channels))
        self.adaln_single = _AdaLayerNormSingle(c)
        self.caption_projection = None
        if c.caption_channels is not None:
            self.caption_projection = _CaptionProjection(c.caption_channels, channels)
        number_blocks(self, Block)
        if c.cross_attention_dim is not None:
            self.segments = ("cross", *self.segments)

    @own_modes()
    def prepare(self, timesteps: Tensor | Sequence[float] | float, encoder_hidden_states: Tensor | None = None, *,
                encoder_attention_mask: Tensor | None = None,
                added_cond_kwargs: Mapping[str, Tensor | None] | None = None) -> TransformerState:
        """Computes what does not depend on the sample, for all timesteps of a call at once.

        timesteps: all network times of the call, shared by the pictures. encoder_hidden_states: (N, T, C) prompt.
        encoder_attention_mask: (N, T), 1 keep, or a bias (N, 1, T) that is added to the scores. added_cond_kwargs: the
        micro-conditions, resolution (N, 2) height and width in pixels, and aspect_ratio (N, 1). Tokens at the end that
        are hidden in every prompt are left out. The result equals, bit for bit, what forward() computes.
        Raises ShapeError for missing conditions or sizes that do not fit.
        """
        times, prompt = list(dict.fromkeys(as_list(timesteps))), self._prompt(encoder_hidden_states)
        mask = encoder_attention_mask
        if prompt is None and mask is not None:
            raise ShapeError("encoder_attention_mask was given to a model without prompts; leave it out")
        batch: int | None = None if prompt is None else len(prompt)
        spans: tuple[Span, ...] = ()
        if prompt is not None and mask is not None:
            prompt, mask = _without_hidden_end(prompt, mask)
            spans = _spans(mask) if mask.shape == prompt.shape[:2] else ()
            mask = None if spans else mask
        micro, which = self._micro(added_cond_kwargs, batch)
        batch = len(which) if batch is None and which is not None else batch
        t = torch.tensor(times, dtype=torch.float64, device=self.device)
        embedded = self.adaln_single.emb.timestep_embedder(t)[:, None]
        embedded = embedded if micro is None else embedded + micro
        shape = embedded.shape[:2]
        rows = by_rows(lambda x: self.adaln_single.linear(F.silu(x)), embedded.flatten(0, 1))
        last = self.scale_shift_table[:, None] + embedded[:, None]
        if prompt is not None and self.caption_projection is not None:
            prompt = self.caption_projection(prompt)
        blocks: Any = self.transformer_blocks
        return TransformerState(
            {x: i for i, x in enumerate(times)}, which,
            rows.view(*shape, 6, self.config.channels).transpose(1, 2)[:, None], last,
            () if prompt is None else tuple(b.attn2.keys_values(prompt) for b in blocks),
            self._bias("encoder_attention_mask", mask, batch), batch, spans=spans)

    @own_modes()
    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor | None = None, *,
                encoder_attention_mask: Tensor | None = None, attention_mask: Tensor | None = None,
                added_cond_kwargs: Mapping[str, Tensor | None] | None = None,
                state: TransformerState | None = None, cache: Session | None = None,
                hooks: Hooks | None = None) -> Tensor:
        """Predicts noise and, behind it, the learned variance.

        sample: (N, in_channels, H, W), H and W multiples of the patch size; returns (N, out_channels, H, W) in the
        model's dtype, channels-last. timestep: number, or tensor () or (N,). attention_mask: of the picture's tokens,
        in the forms of encoder_attention_mask. With ``state`` from prepare() no conditions are given; without it they
        are the arguments of prepare(). cache, hooks: of this call. Raises ShapeError for sizes that do not
        fit, LdmfastError for contradicting arguments.
        """
        self.pos_embed.grid(sample)
        conditions = (encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)
        if state is None:
            state = self.prepare(timestep, encoder_hidden_states, encoder_attention_mask=encoder_attention_mask,
                                 added_cond_kwargs=added_cond_kwargs)
        elif any(x is not None for x in conditions):
            raise LdmfastError("conditions were given together with a prepared state, which holds its own; give one of "
                               "the two")
        step = state.step(timestep, len(sample), self._bias("attention_mask", attention_mask, len(sample)))
        return self.at(as_list(timestep)).run(sample, replace(step, cache=cache, hooks=hooks))

    def run(self, sample: Tensor, step: Step) -> Tensor:
        x = self.pos_embed(sample.to(self.dtype))
        shared, = step.rows
        layers: Any = self.transformer_blocks

        def rows(block: Any) -> Tensor:
            return block.scale_shift_table[:, None] + shared

        blocks = [lambda x, i=i, block=block: block(x, rows(block), step, step.prompts[i] if step.prompts else None)
                  for i, block in enumerate(layers)]
        first = rows(layers[0])
        x = through(step.kept(blocks), x, step.cache,
                    lambda: ops.layer_norm_modulate(x, first[1], first[0], eps=self.config.norm_eps))
        shift, scale = step.last
        patches = self.proj_out(self.norm_out(x, scale, shift, self.proj_out))
        return unpatchify(patches, self.pos_embed.grid(sample), self.config.patch_size)

    def _prompt(self, prompt: Tensor | None) -> Tensor | None:
        c = self.config
        if c.cross_attention_dim is None:
            return None
        dim = c.caption_channels or c.cross_attention_dim
        if prompt is None or prompt.ndim != 3 or prompt.shape[2] != dim:
            raise ShapeError(f"encoder_hidden_states has shape {None if prompt is None else tuple(prompt.shape)}, "
                             f"needs (pictures, tokens, {dim})")
        return prompt.to(self.dtype)

    def _bias(self, name: str, mask: Tensor | None, pictures: int | None) -> Tensor | None:
        """(N, 1, 1, keys), or None where nothing is hidden."""
        if mask is not None and mask.ndim == 3 and mask.shape[1] == 1 and len(mask) == pictures:
            return mask[:, None].to(self.dtype)
        bias = mask_bias(name, mask, pictures or 0, self.dtype)
        return None if bias is None or not bool(bias.any()) else bias

    def _micro(self, given: Mapping[str, Tensor | None] | None, batch: int | None
               ) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings of the distinct micro-conditions (conditions, C), and which each picture has; None without."""
        if not self.config.micro:
            return None, None
        resolution, ratio = (given or {}).get("resolution"), (given or {}).get("aspect_ratio")
        if resolution is None or ratio is None:
            raise ShapeError("added_cond_kwargs lacks resolution (pictures, 2) or aspect_ratio (pictures, 1), which "
                             "this model needs")
        numbers = torch.cat([resolution.reshape(-1, 2).float(), ratio.reshape(-1, 1).float()], 1) if (
            resolution.numel() == 2 * ratio.numel()) else torch.empty(0, 3)
        if batch is not None and len(numbers) != batch:
            raise ShapeError(f"resolution {tuple(resolution.shape)} and aspect_ratio {tuple(ratio.shape)} need 2 and 1 "
                             f"numbers for each of {batch} pictures")
        distinct, which = torch.unique(numbers.to(self.device), dim=0, return_inverse=True)
        emb: Any = self.adaln_single.emb
        sizes = emb.resolution_embedder(distinct[:, :2].flatten()).view(len(distinct), -1)
        return torch.cat([sizes, emb.aspect_ratio_embedder(distinct[:, 2])], dim=1), which


def _without_hidden_end(prompt: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt and mask up to the last token that is seen in any prompt: the weight of a hidden token is exp(-10000) = 0
    beside one that is seen. A prompt without any is averaged over all of them instead, and everything stays."""
    if mask.ndim != 2 or mask.shape != prompt.shape[:2] or not mask.numel() or not bool((mask > 0).any(1).all()):
        return prompt, mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        return prompt, mask
    end = int((mask > 0).any(0).nonzero().max()) + 1
    return prompt[:, :end], mask[:, :end]


def _spans(mask: Tensor) -> tuple[Span, ...]:
    """Neighbouring pictures that see equally many tokens, if every row of the mask (N, T) is ones and then zeros; ()
    for any other mask."""
    ends = (mask > 0).sum(1)
    if not bool((mask == (torch.arange(mask.shape[1], device=mask.device) < ends[:, None])).all()):
        return ()
    spans: list[Span] = []
    for i, tokens in enumerate(ends.tolist()):
        if tokens < 1:
            return ()
        if spans and spans[-1].tokens == tokens:
            spans[-1] = spans[-1]._replace(end=i + 1)
        else:
            spans.append(Span(i, i + 1, int(tokens)))
    return tuple(spans)
