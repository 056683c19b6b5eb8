"""What diffusion transformers on one token sequence share: patches, adaLN-modulated blocks, and what of a call does not
depend on the sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import LdmfastError, ShapeError
from .direct import Direct
from .gemm import Conv2d, GatedLinear, Linear, Quantized
from .hooks import Hooks
from .layers import Attention, KeysValues, as_tokens, by_rows, channels_last, normed_for, timestep_embedding
from .linears import GeluLinear
from .unet_state import as_list

if TYPE_CHECKING:
    from ..caches import Session

# adaLN rows of all steps that a state may hold; beyond it they are made at each step (50 steps of DiT-XL for 8 classes
# and the empty one are 175 MiB in bf16)
_MOST_HELD = 256 << 20  # bytes


@functools.lru_cache(maxsize=4)  # a call asks for one size over and over; 4096 tokens of 1152 channels are 18 MiB
def sincos_2d(channels: int, height: int, width: int, base: int, scale: float, device: torch.device) -> Tensor:
    """Positions of a grid of patches (height * width, channels) fp32, rows first: sines and cosines of the column, then
    of the row (MAE, He et al. 2022, after Vaswani et al. 2017). A grid of another size than ``base`` is stretched to
    it, and all is divided by ``scale``."""
    quarter = channels // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    waves = []
    for size in (width, height):
        angles = (torch.arange(size, dtype=torch.float64) * (base / size / scale))[:, None] * omega
        waves.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    columns = waves[0][None].expand(height, -1, -1)
    rows = waves[1][:, None].expand(-1, width, -1)
    with torch.inference_mode(False):
        return torch.cat([columns, rows], dim=2).flatten(0, 1).float().to(device)


class PatchEmbed(Direct):
    """(N, C, H, W) -> tokens (N, H / p * W / p, D): a convolution with stride p, plus the positions."""

    def __init__(self, in_channels: int, channels: int, patch: int, sample_size: int, scale: float = 1.0):
        super().__init__()
        self.proj = Conv2d(in_channels, channels, patch, stride=patch)
        self.patch, self.base, self.scale = patch, sample_size // patch, scale

    def grid(self, sample: Tensor) -> tuple[int, int]:
        """Patches along height and width. Raises ShapeError for a sample that this network does not take."""
        c, p = self.proj.in_channels, self.patch
        if sample.ndim != 4 or sample.shape[1] != c or sample.shape[2] % p or sample.shape[3] % p:
            raise ShapeError(f"sample has shape {tuple(sample.shape)}, needs (pictures, {c}, height, width), height "
                             f"and width multiples of the patch size {p}")
        return sample.shape[2] // p, sample.shape[3] // p

    def positions(self, sample: Tensor) -> Tensor:
        """Of the patches of a sample of this size, (patches, D) fp32."""
        h, w = self.grid(sample)
        return sincos_2d(self.proj.out_channels, h, w, self.base, self.scale, sample.device)

    def forward(self, sample: Tensor) -> Tensor:
        tokens = as_tokens(self.proj(channels_last(sample)))
        return tokens.add_(self.positions(sample))


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(N, h * w, p * p * C) -> (N, C, h * p, w * p), channels-last."""
    n, (h, w) = len(tokens), grid
    pixels = tokens.view(n, h, w, patch, patch, tokens.shape[2] // patch**2).transpose(2, 3)
    return pixels.reshape(n, h * patch, w * patch, pixels.shape[-1]).permute(0, 3, 1, 2)


class Sinusoids(Direct):
    """Numbers (R,) -> embeddings (R, D): 256 sinusoids through two linears."""

    waves = 256

    def __init__(self, channels: int, freq_shift: float):
        super().__init__()
        self.linear_1 = Linear(self.waves, channels)
        self.linear_2 = Linear(channels, channels)
        self.freq_shift = freq_shift

    def forward(self, numbers: Tensor) -> Tensor:
        bias = self.linear_1.bias  # which is there, packed or not
        x = timestep_embedding(numbers, self.waves, freq_shift=self.freq_shift).to(bias.dtype)
        return by_rows(lambda rows: self.linear_2(nn.functional.silu(self.linear_1(rows))), x)


class LayerNorm(Direct, nn.LayerNorm):
    """LayerNorm of tokens, y * (1 + scale) + shift, in the form that ``layer`` takes."""

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, layer: Linear) -> Any:  # type: ignore[override]
        own = self._parameters
        return normed_for(layer, x, scale, shift, own["weight"], own["bias"], self.eps)


class _Projection(nn.Module):
    """The first layer of an MLP, under the name that diffusers gives it."""

    def __init__(self, proj: Linear):
        super().__init__()
        self.proj = proj


class MLP(Direct):
    """net.2(act(net.0.proj(x))). activation: "gelu-approximate" (tanh), "gelu", or "geglu" (Shazeer 2020)."""

    def __init__(self, channels: int, activation: str):
        super().__init__()
        inner = 4 * channels
        first = (GatedLinear(channels, 2 * inner) if activation == "geglu" else
                 GeluLinear(channels, inner) if activation == "gelu-approximate" else Linear(channels, inner))
        self.net = nn.ModuleList([_Projection(first), nn.Identity(), Linear(inner, channels)])

    @property
    def entry(self) -> Linear:
        """The layer that takes the tokens."""
        return cast(_Projection, self.net[0]).proj

    def forward(self, x: Tensor | Quantized) -> Tensor:
        first, last = self.entry, cast(Linear, self.net[2])
        if isinstance(first, GatedLinear):
            return last(first(x, codes=last.row_form or last.int8 is not None))
        inner = first(x)
        return last(inner if isinstance(first, GeluLinear) else nn.functional.gelu(inner))


class Span(NamedTuple):
    """Pictures [first, end) see the first ``tokens`` tokens of their prompts."""

    first: int
    end: int
    tokens: int


@dataclass(frozen=True)
class Step:
    """What one evaluation takes from the state. rows: (blocks or 1, 6, N, C), last: (2, N, C) shift and scale of the
    last norm. spans: as in TransformerState."""

    rows: Tensor
    last: Tensor
    prompts: tuple[KeysValues, ...] = ()
    prompt_bias: Tensor | None = None
    self_bias: Tensor | None = None
    spans: tuple[Span, ...] = ()
    cache: Session | None = None
    hooks: Hooks | None = None

    def kept(self, blocks: Sequence[Any]) -> list[Any]:
        """A network's blocks without those that are left out."""
        return [b for i, b in enumerate(blocks) if self.hooks is None or i not in self.hooks.skipped]


class Block(Direct):
    """Self-attention and MLP, each modulated and gated (adaLN-zero: Peebles and Xie 2023, figure 3); between them
    cross-attention, neither normed nor gated, where there is a prompt (PixArt: Chen et al. 2023, figure 4).

    The norms have names of their own in each family, so subclasses make them.
    """

    place = -1  # among the network's, for its cache

    def __init__(self, channels: int, heads: int, activation: str, bias: bool, context: int | None = None):
        super().__init__()
        self.attn1 = Attention(channels, heads, channels // heads, bias=bias)
        if context is not None:
            self.attn2 = Attention(channels, heads, channels // heads, context, bias=bias)
        self.ff = MLP(channels, activation)

    def norms(self) -> tuple[LayerNorm, LayerNorm]:
        """Of the self-attention and of the MLP."""
        raise NotImplementedError

    def forward(self, x: Tensor, rows: Tensor, step: Step, prompt: KeysValues | None = None) -> Tensor:
        """x: (N, T, C). rows: (6, N, C), shift, scale and gate of the attention, then of the MLP."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows.unbind()
        norm, mlp_norm = self.norms()
        cache, place = step.cache, self.place
        own = None if step.hooks is None else step.hooks.attend.get(place)

        def attend() -> Tensor:
            return self.attn1(norm(x, scale, shift, self.attn1.entry), bias=step.self_bias, attend=own)

        x = ops.gate_residual(x, attend() if cache is None else cache.value("self", place, attend), gate)
        if prompt is not None and cache is None:
            x = self._see(x, prompt, step)
        elif prompt is not None and cache is not None:  # the residual is told from an x that is not overwritten
            x = cache.delta("cross", place, x, lambda: self._see(x.clone(), prompt, step))

        def feed() -> Tensor:
            return self.ff(mlp_norm(x, mlp_scale, mlp_shift, self.ff.entry))

        return ops.gate_residual(x, feed() if cache is None else cache.value("mlp", place, feed), mlp_gate)


    def _see(self, x: Tensor, prompt: KeysValues, step: Step) -> Tensor:
        """x plus its attention to the prompt. Overwrites x where pictures see prompts of different lengths, or of one
        token."""
        if not step.spans or (len(step.spans) == 1 and step.spans[0].tokens > 1):
            return self.attn2(x, prompt, step.prompt_bias, x)
        to_out, = self.attn2.to_out
        for first, end, tokens in step.spans:
            some, (k, v) = x[first:end], (part[first:end, :tokens] for part in prompt)
            if tokens == 1:  # whose weight is 1, whatever the query: an empty prompt is one token of T5
                some.add_(by_rows(to_out, v.flatten(1)).unsqueeze(1))
            else:
                some.copy_(self.attn2(some, (k, v), None, some))
        return x


@dataclass(frozen=True)
class TransformerState:
    """Result of ``prepare``: adaLN rows of all timesteps, prompt keys and values.

    times: timestep -> its number. which: (pictures,) int, the condition of each picture, or None where all have the
    same. rows: (timesteps, blocks or 1, 6, conditions, C) shift, scale and gate of attention and MLP. last: (timesteps,
    2, conditions, C) shift and scale of the last norm. batch: the number of pictures the conditions were given for, or
    None. spans: which pictures see how many tokens of the prompts, where masks only hide their ends; there is no
    prompt_bias then. A state that would be too large has no ``rows``: ``at`` then makes those of one timestep.
    """

    times: dict[float, int]
    which: Tensor | None
    rows: Tensor | None
    last: Tensor
    prompts: tuple[KeysValues, ...] = ()
    prompt_bias: Tensor | None = None
    batch: int | None = None
    at: Callable[[int], Tensor] | None = None
    spans: tuple[Span, ...] = ()

    @property
    def numbers(self) -> dict[float, int]:
        """timestep -> its number."""
        return self.times

    def step(self, timestep: Tensor | float, pictures: int, self_bias: Tensor | None = None) -> Step:
        """The part for one evaluation. timestep: number, or tensor () or (pictures,).

        Raises ShapeError for another number of pictures than prepared, LdmfastError for another timestep.
        """
        if self.batch not in (None, pictures):
            raise ShapeError(f"sample has {pictures} pictures, the conditions were given for {self.batch}; they must "
                             "agree")
        numbers = [self._number(t) for t in as_list(timestep)]
        if len(numbers) not in (1, pictures):
            raise ShapeError(f"timestep has {len(numbers)} entries, needs 1 or one for each of {pictures} pictures")
        which = torch.zeros(pictures, dtype=torch.long, device=self.last.device) if self.which is None else self.which
        if len(set(numbers)) <= 1:
            number = numbers[0] if numbers else 0
            rows, last = self._rows(number)[:, :, which], self.last[number][:, which]
        else:
            made = {n: self._rows(n) for n in set(numbers)}
            rows = torch.stack([made[n][:, :, i] for n, i in zip(numbers, which)], dim=2)
            last = torch.stack([self.last[n][:, i] for n, i in zip(numbers, which)], dim=1)
        return Step(rows, last, self.prompts, self.prompt_bias, self_bias, self.spans)

    def step_at(self, row: Tensor, pictures: int) -> Step:
        """The part for one evaluation of a timestep whose number only the device knows, int64 (1,). The state must
        have ``rows``."""
        assert self.rows is not None
        rows, last = self.rows.index_select(0, row)[0], self.last.index_select(0, row)[0]
        which = torch.zeros(pictures, dtype=torch.long, device=row.device) if self.which is None else self.which
        return Step(rows[:, :, which], last[:, which], self.prompts, self.prompt_bias, None, self.spans)

    def _rows(self, number: int) -> Tensor:
        if self.rows is not None:
            return self.rows[number]
        assert self.at is not None
        return self.at(number)

    def _number(self, timestep: float) -> int:
        if timestep not in self.times:
            raise LdmfastError(f"timestep {timestep} was not prepared; call prepare() with it ({len(self.times)} "
                               "timesteps were)")
        return self.times[timestep]


def too_many(timesteps: int, conditions: int, blocks: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether a state does not hold the adaLN rows of all timesteps."""
    return timesteps * conditions * blocks * 6 * channels * dtype.itemsize > _MOST_HELD
