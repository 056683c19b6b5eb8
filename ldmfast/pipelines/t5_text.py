"""Prompts to the states of a T5 encoder (PixArt, SD 3, FLUX), which is transformers' own model, of the encoder half
only."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..checkpoints import Parts
from ..errors import CheckpointError, LdmfastError
from ..models.rowwise import rows_to_int8
from .text import PromptEmbeds

_LOCK = threading.Lock()  # tokenizers keep state while they run
_MOST_CACHED = 64 << 20  # bytes; a prompt of 40 tokens of T5-XXL is 320 KiB in bf16


class T5Encoder:
    """A tokenizer and its encoder, and the states of the prompts seen last.

    A prompt is encoded alone and without padding: what it gives does not depend on its neighbours, so it can be kept,
    and the padding, which the network never sees behind the mask, costs nothing (T5-XXL is most of a PixArt call's
    start). One encoder has one cache; both go together.
    """

    def __init__(self, tokenizer: Any, model: Any):
        self.tokenizer, self.model = tokenizer, model
        self._kept: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def encode(self, prompts: list[str], max_sequence_length: int) -> PromptEmbeds:
        """States (N, tokens, width) and mask (N, tokens), 1 for the prompt's own tokens, as long as the longest.

        Prompts are lowercased and stripped; of longer ones the end is cut off, with a warning that shows it.
        """
        rows = [self._states(self._tokens(p.lower().strip(), max_sequence_length)) for p in prompts]
        mask = pad_sequence([r.new_ones(len(r), dtype=torch.long) for r in rows], batch_first=True)
        return PromptEmbeds(pad_sequence(rows, batch_first=True), None, mask)

    def padded(self, prompts: list[str], length: int) -> Tensor:
        """States (N, length, width) of prompts as they are, filled up with padding that the encoder sees as text: what
        SD 3 and FLUX were trained with. Each prompt alone, and kept, as in encode()."""
        rows = []
        for prompt in prompts:
            ids = self._tokens(prompt, length)
            rows.append(self._states(ids + (self.tokenizer.pad_token_id,) * (length - len(ids))))
        return torch.stack(rows)

    def _tokens(self, prompt: str, limit: int) -> tuple[int, ...]:
        with _LOCK:
            ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
            if len(ids) > limit:
                cut = self.tokenizer.decode(ids[limit - 1:-1]).strip()
                warnings.warn(f"the prompt has {len(ids) - 1} tokens and max_sequence_length={limit} leaves room for "
                              f"{limit - 1}; cut off: {cut!r} (prompt: {prompt[:40]!r}...)", stacklevel=2)
                ids = self.tokenizer(prompt, truncation=True, max_length=limit).input_ids
        return tuple(ids)

    def _states(self, ids: tuple[int, ...]) -> Tensor:
        """(tokens, width)"""
        with _LOCK:
            kept = self._kept.get(ids)
            if kept is not None:
                self._kept.move_to_end(ids)
                return kept
            with torch.inference_mode():
                states = self.model(torch.tensor([ids], device=self.model.device)).last_hidden_state[0]
            if not bool(torch.isfinite(states).all()):
                return states  # not kept: who looks for the first NaN has to come by here again
            self._kept[ids] = states
            size = sum(t.numel() * t.element_size() for t in self._kept.values())
            while size > _MOST_CACHED and len(self._kept) > 1:
                _, old = self._kept.popitem(last=False)
                size -= old.numel() * old.element_size()
        return states


class Int8Stored(nn.Linear):
    """x W^T with W kept as int8 and one fp32 scale for each output: half of bf16's memory. Only storage is in 8 bits,
    as T5's activations reach far beyond what 8 bits hold; the numbers are exact in x's dtype, the scale comes after."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype)).mul_(self.scale.to(x.dtype))


def _store_in_int8(model: Any) -> set[str]:
    """Makes the linears of the (meta) encoder's blocks Int8Stored; the names of their weights."""
    names = set()
    for name, layer in model.encoder.block.named_modules():
        if isinstance(layer, nn.Linear):
            layer.__class__ = Int8Stored
            layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
            layer.register_buffer("scale", torch.empty(layer.out_features, device="meta"))
            names.add(f"encoder.block.{name}.weight")
    return names


def load_t5(parts: Parts, suffix: str, dtype: torch.dtype, device: torch.device, int8: bool = False) -> T5Encoder:
    """The parts text_encoder and tokenizer (with this suffix) of a checkpoint. Weights are read by our own readers.
    int8: those of the blocks are kept in 8 bits, each as soon as it is read.

    Raises CheckpointError for parts that do not fit together or are not readable."""
    return T5Encoder(_tokenizer(parts, f"tokenizer{suffix}"),
                     _model(parts, f"text_encoder{suffix}", dtype, device, int8))


def _tokenizer(parts: Parts, part: str) -> Any:
    from transformers import AutoTokenizer

    folder = parts.folder(part)
    if folder is None:
        raise CheckpointError(f"{parts.path}: holds no T5 tokenizer; open the model's diffusers folder")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise CheckpointError(f"{parts.path}: part {part!r} is not a readable T5 tokenizer "
                              f"({(str(error).splitlines() or ['?'])[0]}); tokenizer.json is needed where "
                              "sentencepiece is not installed") from error


def _model(parts: Parts, part: str, dtype: torch.dtype, device: torch.device, int8: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel

    try:
        with torch.device("meta"):
            model = T5EncoderModel(T5Config(**parts.config(part)))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{parts.path}: part {part!r} has a config that is no T5 encoder's "
                              f"({(str(error).splitlines() or ['?'])[0]})") from error
    embedding = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor under two names, of which one is stored
    eight = _store_in_int8(model) if int8 else set()
    weights: dict[str, Tensor] = {}
    for name, tensor in parts.stream(part, dtype, device):
        if name in eight:
            weights[name], weights[f"{name.removesuffix('weight')}scale"] = rows_to_int8(tensor)
        elif not name.startswith("decoder."):
            weights[name] = tensor
    stored = next((weights[n] for n in embedding if n in weights), None)
    if stored is not None:
        weights |= dict.fromkeys(embedding, stored)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{parts.path}: part {part!r}: {' '.join(str(error).split())[:300]}") from error
    model.encoder.embed_tokens = model.shared
    return model.eval().requires_grad_(False)


def check_limit(pipe_limit: int, value: Any) -> int:
    """max_sequence_length of a call. Raises LdmfastError unless it is a number of tokens, at least 1."""
    if value is None:
        return pipe_limit
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LdmfastError(f"max_sequence_length={value!r} is not a number of tokens of at least 1")
    return value
