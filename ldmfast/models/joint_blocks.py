"""What SD3's and FLUX's transformers share: attention over text and image tokens together, and modulation by the time.

Tokens are (N, T, C). In everything joint the text comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import LdmfastError, ShapeError
from .direct import Direct
from .gemm import Linear, Quantized
from .hooks import Attend, Hooks
from .layers import Joined, TimestepEmbedding, by_rows, normed_for, timestep_embedding
from .linears import GeluLinear
from .unet_state import as_list, rows_of

if TYPE_CHECKING:
    from ..caches import Session

EPS = 1e-6
_TIME_CHANNELS = 256

Rope = tuple[Tensor, Tensor]  # cosines and sines (T, head_dim / 2), fp32


class RMSNorm(nn.Module):
    """The gain of an RMS norm over the channels of a head (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


def rotary(ids: Tensor, axes: Sequence[int], theta: float = 10000.0) -> Rope:
    """Positions (T, axes) -> cosines and sines (T, sum(axes) / 2); axis i turns axes[i] channels. Angles in fp64."""
    angles = []
    for i, width in enumerate(axes):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width
        angles.append(ids[:, i, None].double() / theta ** exponent)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


class JointAttention(Joined):
    """Attention of image tokens and, with ``text``, of text tokens to all of both (Esser et al. 2024, figure 2).

    text_out: the text gets an output, too. out: there are output projections at all.
    """

    to_qkv: Linear | None  # to_q, to_k and to_v as one product, and the same of the text, after join()
    to_added_qkv: Linear | None

    fp8 = False  # Model.attend_in_fp8

    def __init__(self, dim: int, heads: int, head_dim: int, *, text: bool = True, text_out: bool = True,
                 qk_norm: bool = True, out: bool = True):
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim, self.text = heads, head_dim, text
        self.norm_q = self.norm_k = self.norm_added_q = self.norm_added_k = None
        self.to_q, self.to_k, self.to_v = (Linear(dim, inner) for _ in range(3))
        self.to_qkv = self.to_added_qkv = None
        if qk_norm:
            self.norm_q, self.norm_k = RMSNorm(head_dim), RMSNorm(head_dim)
        self.to_out = nn.ModuleList([Linear(inner, dim)]) if out else None
        if text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(dim, inner) for _ in range(3))
            if qk_norm:
                self.norm_added_q, self.norm_added_k = RMSNorm(head_dim), RMSNorm(head_dim)
        self.to_add_out = Linear(inner, dim) if text and text_out else None

    @property
    def groups(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        own = ("to_qkv", ("to_q", "to_k", "to_v"))
        return (own, ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))) if self.text else (own,)

    @property
    def entry(self) -> Linear:
        """The layer that takes the image's tokens."""
        return self.to_q if self.to_qkv is None else self.to_qkv

    @property
    def text_entry(self) -> Linear:
        return self.add_q_proj if self.to_added_qkv is None else self.to_added_qkv

    def project(self, x: Tensor | Quantized, text: bool = False) -> Tensor:
        """Tokens -> q, k and v (N, T, 3, heads, head_dim)."""
        joined = self.to_added_qkv if text else self.to_qkv
        if joined is not None:
            qkv = joined(x)
        else:
            own: Any = self._modules
            qkv = torch.cat([own[n](x) for n in self.groups[1 if text else 0][1]], dim=-1)
        return cast(Tensor, qkv).unflatten(-1, (3, self.heads, self.head_dim))

    def normed(self, qkv: Tensor, text: Tensor | None, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (N, all tokens, heads, head_dim) after the norms and the rotation. Gathering both streams is one
        copy, 3% of the projection; a product that writes there itself has no packed weight and takes 11% more."""
        cos, sin = (None, None) if rope is None else rope
        if text is None and rope is None and self.norm_q is None:
            q, k, v = qkv.unbind(2)
            return q, k, v
        gains = [None if n is None else n.weight for n in (self.norm_q, self.norm_k)]
        added = [None if n is None or text is None else n.weight for n in (self.norm_added_q, self.norm_added_k)]
        return ops.qk_norm_rope(qkv, text, q_weight=gains[0], k_weight=gains[1], context_q_weight=added[0],
                                context_k_weight=added[1], cos=cos, sin=sin, eps=None if gains[0] is None else EPS)

    def forward(self, x: Tensor | Quantized, text: Tensor | Quantized, rope: Rope | None = None,
                keep: Callable[[Tensor], None] | None = None, attend: Attend | None = None,
                ) -> tuple[Tensor, Tensor | None]:
        """Image and text tokens -> their outputs, projected; the text's is None without ``text_out``. rope: of all
        tokens, the text's first. keep: is given q, k and v of the text, before norms and rotation."""
        text_qkv = self.project(text, text=True)
        if keep is not None:
            keep(text_qkv)
        q, k, v = self.normed(self.project(x), text_qkv, rope)
        cut, (to_out,) = text_qkv.shape[1], cast(Any, self.to_out)
        if self.to_add_out is None:
            return to_out(_mixed(q[:, cut:], k, v, attend, cut, self.fp8).flatten(2)), None
        out = _mixed(q, k, v, attend, cut, self.fp8).flatten(2)
        return to_out(out[:, cut:]), self.to_add_out(out[:, :cut])

    def alone(self, x: Tensor | Quantized, rope: Rope | None = None, keep: Callable[[Tensor], None] | None = None,
              attend: Attend | None = None) -> Tensor:
        """Attention among the given tokens; not projected if there is no output projection. keep: is given q, k and v
        before norms and rotation."""
        qkv = self.project(x)
        if keep is not None:
            keep(qkv)
        out = _mixed(*self.normed(qkv, None, rope), attend, fp8=self.fp8).flatten(2)
        return out if self.to_out is None else self.to_out[0](out)

    def beside(self, x: Tensor | Quantized, text_qkv: Tensor, rope: Rope | None = None,
               attend: Attend | None = None) -> Tensor:
        """The image's output alone, beside text whose q, k and v are given as keep() got them; not projected if there
        is no output projection."""
        qkv, cut = self.project(x), text_qkv.shape[1]
        q, k, v = (self.normed(qkv, text_qkv, rope) if self.text else
                   self.normed(torch.cat([text_qkv, qkv], dim=1), None, rope))
        out = _mixed(q[:, cut:], k, v, attend, cut, self.fp8).flatten(2)
        return out if self.to_out is None else self.to_out[0](out)


def _mixed(q: Tensor, k: Tensor, v: Tensor, attend: Attend | None = None, text: int = 0, fp8: bool = False) -> Tensor:
    if attend is not None:
        return attend(q, k, v, None, text)
    return ops.attention_fp8(q, k, v) if fp8 else ops.attention(q, k, v)


class _Gelu(nn.Module):
    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = GeluLinear(dim, inner)


class GeluFeedForward(Direct):
    """net.2(gelu(net.0.proj(x)))."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList([_Gelu(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim)])

    @property
    def entry(self) -> GeluLinear:
        """The layer that takes the tokens."""
        return cast(_Gelu, self.net[0]).proj

    def forward(self, x: Tensor | Quantized) -> Tensor:
        first, _, last = self.net
        return last(cast(_Gelu, first).proj(x))


class Modulation(Direct):
    """linear(silu(time embedding)): ``parts`` rows of channels for a block (Peebles and Xie 2023, section 3.2). Runs
    once a call, for all its timesteps; blocks read their rows from the step."""

    slot = -1

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.linear = Linear(dim, parts * dim)
        self.parts = parts


def modulated(x: Tensor, shift: Tensor, scale: Tensor, *layers: Linear) -> tuple[Any, ...]:
    """LayerNorm(x) * (1 + scale) + shift, in the form that each of the layers takes."""
    forms = [(layer.int8 is not None, layer.row_form) for layer in layers]
    made: dict[Any, Any] = {}
    for form, layer in zip(forms, layers):
        if form not in made:
            made[form] = normed_for(layer, x, scale, shift, None, None, EPS)
    return tuple(made[form] for form in forms)


def gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y, one gate row (N, C) for all tokens of a picture; fp16 is held within its range."""
    out = ops.gate_residual(x, y, gate)
    return out.clamp_(-65504, 65504) if out.dtype == torch.float16 else out


class TimeTextEmbedding(Direct):
    """Embeddings of time, guidance (if any) and pooled prompt, summed."""

    def __init__(self, dim: int, pooled: int, guidance: bool = False):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_TIME_CHANNELS, dim)
        self.guidance_embedder = TimestepEmbedding(_TIME_CHANNELS, dim) if guidance else None
        self.text_embedder = TimestepEmbedding(pooled, dim)

    def forward(self, times: Tensor, pooled: Tensor, guidance: Tensor | None = None) -> Tensor:
        """times (R,) and guidance (N,), both as the sinusoids take them; pooled (N, P) -> (R, N, D)."""
        dtype = pooled.dtype
        rest = self.text_embedder(pooled)
        if guidance is not None and self.guidance_embedder is not None:
            rest = rest + self.guidance_embedder(timestep_embedding(guidance, _TIME_CHANNELS).to(dtype))
        return self.timestep_embedder(timestep_embedding(times, _TIME_CHANNELS).to(dtype))[:, None] + rest


class Step(NamedTuple):
    """One evaluation. rows: for each Modulation, by its slot, (N, parts, C). text: (N, T, C). cache: what is asked at
    each segment."""

    rows: tuple[Tensor, ...]
    text: Tensor
    rope: Rope | None
    cache: Session | None = None
    hooks: Hooks | None = None


@dataclass(frozen=True)
class JointState:
    """What does not depend on the sample: the embedded prompt, angles of the positions, and the modulation of every
    block at every timestep. rows: timestep -> row of ``modulations``, (timesteps, N, parts, C) each. tokens: image
    tokens that the angles are for."""

    rows: dict[float, int]
    modulations: tuple[Tensor, ...]
    text: Tensor
    rope: Rope | None = None

    @property
    def numbers(self) -> dict[float, int]:
        """timestep -> its number."""
        return self.rows

    @property
    def tokens(self) -> int | None:
        return None if self.rope is None else len(self.rope[0]) - self.text.shape[1]

    def step(self, timestep: Tensor | float, pictures: int) -> Step:
        """timestep: number, or tensor () or (N,). Raises ShapeError for another number of pictures than prepared,
        LdmfastError for another timestep."""
        if pictures != len(self.text):
            raise ShapeError(f"sample has {pictures} pictures, the conditions were given for {len(self.text)}; they "
                             "must agree")
        rows = rows_of(self.rows, timestep, pictures)
        if len(set(rows)) <= 1:
            chosen = tuple(m[rows[0] if rows else 0] for m in self.modulations)
        else:
            own = torch.arange(pictures, device=self.text.device)
            index = torch.tensor(rows, device=self.text.device)
            chosen = tuple(m[index, own] for m in self.modulations)
        return Step(chosen, self.text, self.rope)

    def step_at(self, row: Tensor, pictures: int) -> Step:
        """The part for one evaluation at a row of the modulations that only the device knows. row: int64 (1,)."""
        return Step(tuple(m.index_select(0, row)[0] for m in self.modulations), self.text, self.rope)


class Modulations:
    """The modulations of a network, in the order of their slots in the state."""

    def __init__(self, model: nn.Module) -> None:
        self.all = tuple(m for m in model.modules() if isinstance(m, Modulation))
        for slot, modulation in enumerate(self.all):
            modulation.slot = slot

    def project(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """Time embedding (timesteps, N, D) -> (timesteps, N, parts, C) for each."""
        rows = by_rows(F.silu, embedding.flatten(0, 1))
        return tuple(by_rows(m.linear, rows).view(*embedding.shape[:2], m.parts, rows.shape[1]) for m in self.all)


def check_conditions(prompt: Tensor | None, pooled: Tensor | None, width: int, pooled_width: int,
                     ) -> tuple[Tensor, Tensor]:
    """Raises ShapeError unless they are (N, T, width) and (N, pooled_width)."""
    if prompt is None or prompt.ndim != 3 or prompt.shape[2] != width:
        raise ShapeError(f"encoder_hidden_states has shape {None if prompt is None else tuple(prompt.shape)}, needs "
                         f"(pictures, tokens, {width})")
    if pooled is None or tuple(pooled.shape) != (len(prompt), pooled_width):
        raise ShapeError(f"pooled_projections has shape {None if pooled is None else tuple(pooled.shape)}, needs "
                         f"({len(prompt)}, {pooled_width})")
    return prompt, pooled


def distinct(timesteps: Tensor | Sequence[float] | float) -> list[float]:
    return list(dict.fromkeys(as_list(timesteps)))


def check_kwargs(kwargs: Any) -> None:
    """joint_attention_kwargs: only diffusers' LoRA scale, which is for layers that are not here, may be there."""
    if kwargs and {k for k, v in kwargs.items() if v is not None} - {"scale"}:
        raise LdmfastError(f"joint_attention_kwargs {sorted(kwargs)} are not supported; leave them out")
