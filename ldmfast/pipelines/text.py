"""Prompts to text-encoder states, for one CLIP encoder (SD 1, SD 2, tiny) or two (SDXL).

Tokenizers come from transformers; they keep mutable state, so one lock serialises them. Text encoders are native and
run in parallel; one of another class (put into the components by hand) runs under the lock, too.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import LdmfastError
from ..models import Model

_LOCK = threading.Lock()


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and its text model; ``penultimate`` takes the last hidden layer but one (SDXL).

    model: native, or any module with the arguments and outputs of transformers' CLIPTextModel.
    """

    tokenizer: Any
    model: Any
    penultimate: bool = False


@dataclass(frozen=True)
class PromptEmbeds:
    """states: (N, tokens, width) for cross-attention; pooled: (N, width) or None (only SDXL uses it); mask: (N,
    tokens), 1 keep and 0 hide, or None (only T5 has one)."""

    states: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def __getitem__(self, rows: slice | torch.Tensor) -> PromptEmbeds:
        return PromptEmbeds(*[None if v is None else v[rows] for v in (self.states, self.pooled, self.mask)])  # type: ignore[arg-type]

    @classmethod
    def cat(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        pooled = [p.pooled for p in parts if p.pooled is not None]
        return cls(torch.cat([p.states for p in parts]), torch.cat(pooled) if pooled else None)

    def repeat(self, times: int) -> PromptEmbeds:
        """Each prompt ``times`` times in a row."""
        pooled, mask = (None if v is None else v.repeat_interleave(times, 0) for v in (self.pooled, self.mask))
        return PromptEmbeds(self.states.repeat_interleave(times, 0), pooled, mask)

    def zeros_like(self) -> PromptEmbeds:
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return PromptEmbeds(torch.zeros_like(self.states), pooled)


def _limit(encoder: TextEncoder) -> int:
    positions = int(encoder.model.config.max_position_embeddings)
    return min(positions, int(encoder.tokenizer.model_max_length))


def tokenize(encoder: TextEncoder, prompts: list[str]) -> torch.Tensor:
    """Token ids (N, limit), padded and cut to the encoder's limit; warns with the text that was cut."""
    tokenizer, limit = encoder.tokenizer, _limit(encoder)
    with _LOCK:
        ids = tokenizer(prompts, padding="max_length", max_length=limit, truncation=False).input_ids
        if any(len(tokens) > limit for tokens in ids):
            whole = ids
            ids = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True).input_ids
            for prompt, tokens in zip(prompts, whole):
                if len(tokens) > limit:
                    cut = tokenizer.decode(tokens[limit - 1 : -1]).strip()
                    warnings.warn(
                        f"the prompt has {len(tokens) - 2} tokens and the text encoder takes {limit - 2}; "
                        f"cut off: {cut!r} (prompt: {prompt[:40]!r}...)", stacklevel=2)
    return torch.tensor(ids)


def _encode_one(encoder: TextEncoder, prompts: list[str], clip_skip: int | None) -> tuple[torch.Tensor, Any]:
    model = encoder.model
    ids = tokenize(encoder, prompts).to(model.device)
    mask = torch.ones_like(ids) if getattr(model.config, "use_attention_mask", False) else None
    hidden = encoder.penultimate or clip_skip is not None
    with nullcontext() if isinstance(model, Model) else _LOCK:
        out = model(ids, attention_mask=mask, output_hidden_states=hidden)
    if encoder.penultimate:
        return out.hidden_states[-2 if clip_skip is None else -(clip_skip + 2)], out[0]
    if clip_skip is None:
        return out[0], None
    text_model = getattr(model, "text_model", model)
    return text_model.final_layer_norm(out.hidden_states[-(clip_skip + 1)]), None


def encode_prompts(
    encoders: tuple[TextEncoder, ...], prompts: list[str], *, clip_skip: int | None = None, one_by_one: bool = False
) -> PromptEmbeds:
    """Encode prompts with every encoder and join their states along the width; equal prompts are encoded once.

    clip_skip counts hidden layers left out at the end, as in diffusers. one_by_one encodes each prompt alone, so
    that its embedding does not depend on its neighbours to the last bit.
    """
    if clip_skip is not None:
        layers = min(int(e.model.config.num_hidden_layers) for e in encoders)
        if not 0 <= clip_skip < layers:
            raise LdmfastError(f"clip_skip={clip_skip} leaves nothing of {layers} layers: choose 0 to {layers - 1}")
    distinct = list(dict.fromkeys(prompts))
    groups = [[p] for p in distinct] if one_by_one else [distinct]
    embeds = []
    with torch.inference_mode():
        for group in groups:
            parts = [_encode_one(e, group, clip_skip) for e in encoders]
            embeds.append(PromptEmbeds(torch.cat([p[0] for p in parts], dim=-1), parts[-1][1]))
        rows = PromptEmbeds.cat(embeds)
        return rows if distinct == prompts else rows[torch.tensor([distinct.index(p) for p in prompts])]
