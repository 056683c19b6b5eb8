"""UNet2DCondition: the denoiser of Stable Diffusion 1.x, 2.x, XL and of class-conditional latent diffusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import LdmfastError, ShapeError
from ..torch_modes import own_modes
from .gemm import Linear
from .hooks import Hooks
from .layers import ACTIVATIONS, TimestepEmbedding, by_rows, timestep_embedding
from .single_file import FromSingleFile
from .unet_config import UNet2DConditionConfig
from .unet_state import UNetState, as_list, mask_bias
from .unet_trunk import UNetTrunk

if TYPE_CHECKING:
    from ..caches import Session


class UNet2DCondition(FromSingleFile, UNetTrunk):
    """Rombach et al. 2022, section 3.3, and SDXL (Podell et al. 2023, section 2). Inference only, thread-safe:
    nothing is written to the module; what depends on the call is in the ``UNetState`` that prepare() returns.
    """

    config_class = UNet2DConditionConfig
    part = "unet"

    def __init__(self, config: UNet2DConditionConfig):
        super().__init__(config, (config.conv_in_kernel, config.conv_out_kernel))
        self.encoder_hid_proj = None
        if config.encoder_hid_dim is not None:
            # a list of cross_attention_dim has no single size to project to; diffusers refuses it, too
            if not isinstance(config.cross_attention_dim, int):
                raise LdmfastError("config key 'encoder_hid_dim' needs one cross_attention_dim, not a list")
            self.encoder_hid_proj = Linear(config.encoder_hid_dim, config.cross_attention_dim)
        if config.addition_embed_type == "text_time":
            size = config.projection_class_embeddings_input_dim or 0  # check() has refused None
            self.add_embedding = TimestepEmbedding(size, config.plan().time_dim)

    @own_modes()
    def prepare(self, timesteps: Tensor | Sequence[float] | float,
                encoder_hidden_states: Tensor | None = None, *, class_labels: Tensor | None = None,
                added_cond_kwargs: Mapping[str, Tensor] | None = None, timestep_cond: Tensor | None = None,
                encoder_attention_mask: Tensor | None = None, beside: UNetState | None = None) -> UNetState:
        """Computes what does not depend on the sample, for all timesteps of a call at once.

        timesteps: all network times of the call, shared by the pictures. encoder_hidden_states: (N, T, C) prompt.
        class_labels: (N,) int, or (N, K) for projected classes. added_cond_kwargs: SDXL's text_embeds (N, P) and
        time_ids (N, 6; refiner 5). timestep_cond: (N, K) guidance embedding (LCM). encoder_attention_mask:
        (N, T), 1 keep. beside: of the same call's timesteps for other pictures; what depends on these alone is taken
        from it. The result equals, bit for bit, what forward() computes from the same conditions.
        Raises ShapeError for missing conditions or sizes that do not fit.
        """
        times = list(dict.fromkeys(as_list(timesteps)))
        prompt = self._prompt(encoder_hidden_states)
        batch = next((len(x) for x in (prompt, class_labels, timestep_cond) if x is not None), None)
        bias = None if prompt is None else mask_bias("encoder_attention_mask", encoder_attention_mask,
                                                     len(prompt), self.dtype)
        prompts = () if prompt is None else self.places.project_prompt(prompt)
        own = (class_labels, timestep_cond, self.config.addition_embed_type)  # what else enters into the time embedding
        if beside is not None and list(beside.rows) == times and own == (None, None, None):
            return UNetState(beside.rows, beside.times, beside.widths, prompts, bias, batch)
        emb = self.embed_time(times, self._guidance(timestep_cond))
        label = self.embed_class(class_labels)
        if label is not None and self.config.class_embeddings_concat:
            shape = torch.broadcast_shapes(emb.shape[:2], (1, len(label)))
            emb = torch.cat([emb.expand(*shape, -1), label.expand(*shape, -1)], dim=-1)
        elif label is not None:
            emb = emb + label
        if self.config.addition_embed_type == "text_time":
            added = self._added(added_cond_kwargs)
            batch, emb = len(added), emb + added
        if self.config.time_embedding_act_fn is not None:
            act = ACTIVATIONS[self.config.time_embedding_act_fn]
            emb = by_rows(act, emb.flatten(0, 1)).unflatten(0, emb.shape[:2])
        return UNetState({t: i for i, t in enumerate(times)}, *self.places.project_times(emb), prompts, bias, batch)

    @own_modes()
    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor | None = None, *,
                class_labels: Tensor | None = None, timestep_cond: Tensor | None = None,
                attention_mask: Tensor | None = None, cross_attention_kwargs: Mapping[str, Any] | None = None,
                added_cond_kwargs: Mapping[str, Tensor] | None = None,
                encoder_attention_mask: Tensor | None = None,
                down_block_additional_residuals: Sequence[Tensor] | None = None,
                mid_block_additional_residual: Tensor | None = None,
                down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
                state: UNetState | None = None, cache: Session | None = None,
                hooks: Hooks | None = None) -> Tensor:
        """Predicts noise (or v, or the sample, as the model was trained).

        sample: (N, in_channels, H, W), any H and W; returns (N, out_channels, H, W) in the model's dtype,
        channels-last. timestep: number, or tensor () or (N,). With ``state`` from prepare() no conditions are
        given; without it they are the arguments of prepare(). attention_mask: (N, H * W) for models with
        transformers at one resolution, 1 keep. down_block_additional_residuals with
        mid_block_additional_residual: ControlNet; the former alone, or down_intrablock_additional_residuals:
        T2I-Adapter. cache, hooks: of this call. Raises ShapeError for sizes that do not fit, LdmfastError
        for contradicting arguments.
        """
        self.check_sample(sample)
        if cross_attention_kwargs and {k for k, v in cross_attention_kwargs.items() if v is not None} - {"scale"}:
            raise LdmfastError(f"cross_attention_kwargs {sorted(cross_attention_kwargs)} are not supported; "
                               "leave them out")
        conditions = (encoder_hidden_states, class_labels, timestep_cond, added_cond_kwargs,
                      encoder_attention_mask)
        if state is None:
            state = self.prepare(timestep, encoder_hidden_states, class_labels=class_labels,
                                 timestep_cond=timestep_cond, added_cond_kwargs=added_cond_kwargs,
                                 encoder_attention_mask=encoder_attention_mask)
        elif any(x is not None for x in conditions):
            raise LdmfastError("conditions were given together with a prepared state, which holds its own; "
                               "give one of the two")
        mask = None if attention_mask is None else mask_bias("attention_mask", attention_mask, len(sample), self.dtype)
        step = state.step(timestep, len(sample), mask)
        step = step if cache is None and hooks is None else replace(step, cache=cache, hooks=hooks)
        controls, adapters = down_block_additional_residuals, down_intrablock_additional_residuals
        if adapters is None and mid_block_additional_residual is None:
            controls, adapters = None, controls  # diffusers' older way to pass T2I-Adapter residuals
        controlled = controls is not None and mid_block_additional_residual is not None
        return self.at(as_list(timestep)).run(sample, step, controls if controlled else None,
                                              mid_block_additional_residual if controlled else None, adapters)

    def _prompt(self, prompt: Tensor | None) -> Tensor | None:
        c = self.config
        blocks = [b for b in (*c.plan().down, c.plan().mid, *c.plan().up) if b is not None and b.kind == "cross"]
        if not blocks:
            return None
        dim = blocks[0].context_dim if self.encoder_hid_proj is None else c.encoder_hid_dim
        if prompt is None or prompt.ndim != 3 or prompt.shape[2] != dim:
            raise ShapeError(f"encoder_hidden_states has shape {None if prompt is None else tuple(prompt.shape)}, "
                             f"needs (pictures, tokens, {dim})")
        if c.dual_cross_attention and prompt.shape[1] != 77 + 257:
            raise ShapeError(f"encoder_hidden_states has {prompt.shape[1]} tokens, a dual model needs 77 + 257")
        prompt = prompt.to(self.dtype)
        return prompt if self.encoder_hid_proj is None else self.encoder_hid_proj(prompt)

    def _guidance(self, condition: Tensor | None) -> Tensor | None:
        dim = self.config.time_cond_proj_dim
        if condition is None:
            return None
        if dim is None or condition.ndim != 2 or condition.shape[1] != dim:
            raise ShapeError(f"timestep_cond has shape {tuple(condition.shape)}, "
                             + ("this model takes none" if dim is None else f"needs (pictures, {dim})"))
        return condition

    def _added(self, given: Mapping[str, Tensor] | None) -> Tensor:
        """SDXL's micro-conditioning (Podell et al. 2023, section 2.2): (N, D)."""
        c = self.config
        missing = [k for k in ("text_embeds", "time_ids") if k not in (given or {})]
        if missing or given is None:
            raise ShapeError(f"added_cond_kwargs lacks {' and '.join(missing)}: this model needs text_embeds "
                             "(pictures, channels) and time_ids (pictures, numbers)")
        text, ids = given["text_embeds"], given["time_ids"]
        waves = timestep_embedding(ids.flatten(), c.addition_time_embed_dim, c.flip_sin_to_cos, c.freq_shift)
        wanted = c.projection_class_embeddings_input_dim
        fits = text.ndim == ids.ndim == 2 and len(text) == len(ids)
        if not fits or text.shape[1] + ids.shape[1] * c.addition_time_embed_dim != wanted:
            raise ShapeError(f"text_embeds {tuple(text.shape)} and time_ids {tuple(ids.shape)} do not make the "
                             f"{wanted} channels the model needs: channels + {c.addition_time_embed_dim} * numbers")
        waves = waves.reshape(len(ids), ids.shape[1] * c.addition_time_embed_dim)
        return self.add_embedding(torch.cat([text, waves], dim=-1).to(self.dtype))


