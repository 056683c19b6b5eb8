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
from ..torch_modes import own_modes
from .prompt_weights import Chunk, chunks, empty

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
    tokens), 1 keep and 0 hide, or None (only T5 has one).

    tokens: (N,) int, how many of a row's tokens are its prompt's; those after are padding that attention must not see.
    None: all of them.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    def __getitem__(self, rows: slice | torch.Tensor) -> PromptEmbeds:
        return PromptEmbeds(*[None if v is None else v[rows] for v in vars(self).values()])  # type: ignore[arg-type]

    @classmethod
    def cat(cls, parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
        """Rows one after the other, the shorter ones padded."""
        longest = max(p.states.shape[1] for p in parts)
        states = [torch.nn.functional.pad(p.states, (0, 0, 0, longest - p.states.shape[1])) for p in parts]
        pooled = [p.pooled for p in parts if p.pooled is not None]
        tokens = None
        if any(p.tokens is not None or p.states.shape[1] < longest for p in parts):
            tokens = torch.cat([torch.full((len(p.states),), p.states.shape[1]) if p.tokens is None else p.tokens
                                for p in parts])
        masks = [torch.nn.functional.pad(p.mask, (0, longest - p.mask.shape[1])) for p in parts if p.mask is not None]
        return cls(torch.cat(states), torch.cat(pooled) if pooled else None, torch.cat(masks) if masks else None,
                   None if masks else tokens)

    def repeat(self, times: int) -> PromptEmbeds:
        """Each prompt ``times`` times in a row."""
        repeated = [None if v is None else v.repeat_interleave(times, 0) for v in vars(self).values()]
        return PromptEmbeds(*repeated)  # type: ignore[arg-type]

    def zeros_like(self) -> PromptEmbeds:
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return PromptEmbeds(torch.zeros_like(self.states), pooled, self.mask, self.tokens)


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


def _chunks(encoder: TextEncoder, prompts: list[str]) -> tuple[list[list[Chunk]], Chunk]:
    """Every prompt's chunks, and that of the empty prompt."""
    tokenizer, size = encoder.tokenizer, _limit(encoder)
    special = (size, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    with _LOCK:
        return [chunks(p, lambda text: tokenizer(text, add_special_tokens=False, verbose=False).input_ids, *special)
                for p in prompts], empty(*special)


def _run(encoder: TextEncoder, ids: torch.Tensor, clip_skip: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids (N, tokens) to states (N, tokens, width) and, for SDXL's encoders, what the model gives first."""
    model = encoder.model
    ids = ids.to(model.device)
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


def _encode_chunks(encoder: TextEncoder, prompts: list[str], clip_skip: int | None, one_by_one: bool
                   ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """(states (chunks * size, width), pooled of the first chunk) of every prompt.

    A token of weight w is moved away from the empty prompt's at its place: empty + w * (token - empty). Pooled rows
    have no weights."""
    made, nothing = _chunks(encoder, prompts)
    weighty = any(w != 1 for prompt in made for chunk in prompt for w in chunk.weights)
    rows = list(dict.fromkeys([c.ids for prompt in made for c in prompt] + ([nothing.ids] if weighty else [])))
    groups = [[r] for r in rows] if one_by_one else [rows]
    parts = [_run(encoder, torch.tensor(group), clip_skip) for group in groups]
    states = dict(zip(rows, torch.cat([p[0] for p in parts])))
    first = [row for _, pooled in parts if pooled is not None for row in pooled]
    pooled = dict(zip(rows, first)) if first else dict.fromkeys(rows)

    def weighted(chunk: Chunk) -> torch.Tensor:
        row = states[chunk.ids]
        if all(w == 1 for w in chunk.weights):
            return row
        weights = torch.tensor(chunk.weights, dtype=torch.float32, device=row.device)[:, None]
        origin = states[nothing.ids].float()
        return torch.where(weights == 1, row, (origin + weights * (row.float() - origin)).to(row.dtype))

    return [(torch.cat([weighted(c) for c in prompt]), pooled[prompt[0].ids]) for prompt in made]


def _plain_embeds(encoders: tuple[TextEncoder, ...], prompts: list[str], clip_skip: int | None, one_by_one: bool
                  ) -> PromptEmbeds:
    embeds = []
    for group in [[p] for p in prompts] if one_by_one else [prompts]:
        parts = [_run(e, tokenize(e, group), clip_skip) for e in encoders]
        embeds.append(PromptEmbeds(torch.cat([p[0] for p in parts], dim=-1), parts[-1][1]))
    return PromptEmbeds.cat(embeds)


def _weighted_embeds(encoders: tuple[TextEncoder, ...], prompts: list[str], clip_skip: int | None, one_by_one: bool
                     ) -> PromptEmbeds:
    """Prompts in the syntax of ``prompt_weights``, of any length; the shorter ones are padded."""
    found = [_encode_chunks(e, prompts, clip_skip, one_by_one) for e in encoders]
    # SDXL's encoders may cut a prompt into different numbers of tokens: what both have is kept, as in ComfyUI
    counts = [min(len(encoder[i][0]) for encoder in found) for i in range(len(prompts))]
    rows = [torch.cat([encoder[i][0][:n] for encoder in found], dim=-1) for i, n in enumerate(counts)]
    states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    last = [row for _, row in found[-1]]
    pooled = None if last[0] is None else torch.stack([row for row in last if row is not None])
    tokens = torch.tensor(counts) if len(set(counts)) > 1 else None
    return PromptEmbeds(states, pooled, None, tokens)


def encode_prompts(
    encoders: tuple[TextEncoder, ...], prompts: list[str], *, clip_skip: int | None = None, one_by_one: bool = False,
    weighting: bool = False
) -> PromptEmbeds:
    """Encode prompts with every encoder and join their states along the width; equal prompts are encoded once.

    clip_skip counts hidden layers left out at the end, as in diffusers. one_by_one encodes each prompt alone, so
    that its embedding does not depend on its neighbours to the last bit. weighting reads "(word:1.3)" and encodes
    prompts of any length (``prompt_weights``); otherwise prompts are plain, and cut at the encoder's limit.
    """
    if clip_skip is not None:
        layers = min(int(e.model.config.num_hidden_layers) for e in encoders)
        if not 0 <= clip_skip < layers:
            raise LdmfastError(f"clip_skip={clip_skip} leaves nothing of {layers} layers: choose 0 to {layers - 1}")
    distinct = list(dict.fromkeys(prompts))
    encode = _weighted_embeds if weighting else _plain_embeds
    with own_modes(torch.inference_mode):
        rows = encode(encoders, distinct, clip_skip, one_by_one)
        return rows if distinct == prompts else rows[torch.tensor([distinct.index(p) for p in prompts])]
