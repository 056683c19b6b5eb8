"""CLIP's text encoders, with and without projection: the prompts of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import LdmfastError, ShapeError
from ..torch_modes import own_modes
from .base import Config, Model, unsupported
from .direct import Direct
from .gemm import Linear
from .layers import Embedding, Joined, LayerNorm

T = TypeVar("T", bound="_TextModel")

_PREFIX = "text_model."
_LEGACY_EOS = 2  # what configs said before it mattered; the pooled token is then the one of highest id


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x) (Hendrycks and Gimpel 2016, section 2); x is overwritten."""
    return x.mul_(torch.sigmoid(1.702 * x))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """config.json of transformers' CLIPTextModel. use_attention_mask is diffusers' own key: prompts are then encoded
    with a mask (of ones, which hides nothing)."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    use_attention_mask: bool = False

    choices: ClassVar = {"hidden_act": tuple(_ACTIVATIONS)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPTextConfig:
        """As Config.from_dict, but other keys are ignored: transformers wrote the defaults of training and of text
        generation into these files, and ignores what it does not know when it reads them."""
        names = {f.name for f in fields(cls)}
        return super().from_dict({k: v for k, v in values.items() if k in names and v is not None})

    def check(self) -> None:
        if not self.num_attention_heads or self.hidden_size % self.num_attention_heads:
            raise unsupported("num_attention_heads", self.num_attention_heads,
                              f"a number that divides hidden_size = {self.hidden_size}")


class TextOutput(NamedTuple):
    """states after the last norm (N, T, C), their row at the end of the text (N, C), and, if asked for, the embeddings
    and every layer's output before the norm."""

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class ProjectedTextOutput(NamedTuple):
    """text_embeds: (N, projection_dim). The others as in TextOutput."""

    text_embeds: Tensor
    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class _Embeddings(Direct):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids).add_(self.position_embedding.weight[:ids.shape[1]])


class _Attention(Joined):
    joins = ("q_proj", "k_proj", "v_proj")
    joined = "qkv_proj"
    qkv_proj: Linear | None

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(dim, dim) for _ in range(4))
        self.qkv_proj = None

    def forward(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        n, tokens, c = x.shape
        if self.qkv_proj is not None:
            qkv = self.qkv_proj(x)
        else:
            qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        q, k, v = qkv.view(n, tokens, 3, self.heads, c // self.heads).unbind(2)
        return self.out_proj(ops.attention(q, k, v, causal=True, bias=bias).flatten(2), residual)


class _MLP(Direct):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)
        self.act = _ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)), residual)


class _Layer(Direct):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = _Attention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = _MLP(config)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = self.self_attn(self.layer_norm1(x), bias, x)
        return self.mlp(self.layer_norm2(x), x)


class _Encoder(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _TextModel(Model):
    config_class = CLIPTextConfig

    @classmethod
    def _own_name(cls, name: str) -> str:
        """The parameter's name in this class; files have them with and without the prefix."""
        return name.removeprefix(_PREFIX)

    @classmethod
    def from_weights(cls: type[T], config: Config | Mapping[str, Any],
                     weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], **options: Any) -> T:
        """As Model.from_weights; names with and without transformers' former prefix "text_model." are taken."""
        items = weights.items() if isinstance(weights, Mapping) else weights
        return super().from_weights(config, ((cls._own_name(n), t) for n, t in items), **options)


class CLIPTextModel(_TextModel):
    """Radford et al. 2021, section 2.4: a transformer with a causal mask, norms first. Inference only, thread-safe."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.final_layer_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    @own_modes()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                output_hidden_states: bool = False) -> TextOutput:
        """input_ids: (N, T) int, T at most max_position_embeddings. attention_mask: (N, T), 1 keep and 0 hide.

        hidden_states: the embeddings, then every layer's output, (N, T, C) each. pooler_output: the first token whose
        id is eos_token_id; where the config has the legacy id 2, the token of highest id.
        Raises ShapeError for other shapes, LdmfastError for an id outside the vocabulary.
        """
        _check(self.config, input_ids, attention_mask)
        bias = None
        if attention_mask is not None:
            bias = torch.zeros(attention_mask.shape, dtype=self.dtype, device=input_ids.device)
            bias = bias.masked_fill_(attention_mask == 0, float("-inf"))[:, None, None]
        x = self.embeddings(input_ids)
        states = [x]
        for layer in self.encoder.layers:
            x = layer(x, bias)
            states.append(x)
        last = self.final_layer_norm(x)
        eos = self.config.eos_token_id
        end = (input_ids if eos == _LEGACY_EOS else (input_ids == eos).int()).argmax(-1)
        pooled = last[torch.arange(len(last), device=last.device), end]
        return TextOutput(last, pooled, tuple(states) if output_hidden_states else None)


class CLIPTextModelWithProjection(_TextModel):
    """CLIPTextModel, and the pooled row projected into the space that CLIP shares with pictures."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.text_model = CLIPTextModel(config)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, bias=False)

    @classmethod
    def _own_name(cls, name: str) -> str:
        return name if name.startswith((_PREFIX, "text_projection.")) else _PREFIX + name

    @own_modes()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                output_hidden_states: bool = False) -> ProjectedTextOutput:
        """As CLIPTextModel.forward, with text_embeds (N, projection_dim) in place of the pooled row."""
        last, pooled, states = self.text_model(input_ids, attention_mask, output_hidden_states)
        return ProjectedTextOutput(self.text_projection(pooled), last, states)


def _check(config: CLIPTextConfig, ids: Tensor, mask: Tensor | None) -> None:
    if ids.ndim != 2 or ids.shape[1] > config.max_position_embeddings:
        raise ShapeError(f"input_ids has shape {tuple(ids.shape)}, needs (texts, tokens) with at most "
                         f"{config.max_position_embeddings} tokens")
    if mask is not None and mask.shape != ids.shape:
        raise ShapeError(f"attention_mask has shape {tuple(mask.shape)}, needs that of input_ids, {tuple(ids.shape)}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
        raise LdmfastError(f"input_ids reach {int(ids.min())}..{int(ids.max())}, the text encoder has "
                           f"{config.vocab_size} tokens; take the tokenizer that belongs to it")
