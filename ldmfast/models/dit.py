"""DiT: the class-conditional diffusion transformer; SiT is the same network, trained to predict a velocity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import CheckpointError, LdmfastError, ShapeError
from ..torch_modes import own_modes
from .base import Config, Model, unsupported
from .direct import Direct
from .gemm import Linear
from .hooks import Hooks
from .layers import Embedding, by_rows
from .segments import number_blocks, through
from .single_file import FromSingleFile
from .transformer_blocks import Block, LayerNorm, PatchEmbed, Sinusoids, Step, TransformerState, too_many, unpatchify
from .unet_state import as_list

if TYPE_CHECKING:
    from ..caches import Session

T = TypeVar("T", bound="DiT")

# the paper's table 1: layers, channels, heads
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


@dataclass(frozen=True)
class DiTConfig(Config):
    """config.json of diffusers' DiTTransformer2DModel. freq_shift is our own key: 1 is what diffusers computes, 0 what
    the networks were trained with (files in the original layout have it)."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5
    freq_shift: int = 1

    choices: ClassVar = {"norm_type": ("ada_norm_zero",), "activation_fn": ("gelu-approximate", "gelu", "geglu")}
    inert: ClassVar = frozenset({"dropout", "norm_num_groups", "upcast_attention"})

    @classmethod
    def named(cls, name: str, **changes: Any) -> DiTConfig:
        """The config of "DiT-XL/2", "SiT-B/4", ...: sizes S, B, L and XL, patches of 2, 4 and 8, learned variance.

        changes: other fields, for instance sample_size. Raises LdmfastError for another name.
        """
        kind, _, rest = name.partition("-")
        size, _, patch = rest.partition("/")
        if kind not in ("DiT", "SiT") or size not in SIZES or patch not in ("2", "4", "8"):
            raise LdmfastError(f"{name!r} is not a DiT; names are {{DiT,SiT}}-{{S,B,L,XL}}/{{2,4,8}}")
        layers, channels, heads = SIZES[size]
        return cls(**{"num_attention_heads": heads, "attention_head_dim": channels // heads, "num_layers": layers,
                      "patch_size": int(patch), "out_channels": 8, **changes})

    def check(self) -> None:
        check_sizes(self)

    @property
    def channels(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def check_sizes(config: Any) -> None:
    """Raises CheckpointError for a width, patch or size that no transformer on patches can have."""
    channels = config.num_attention_heads * config.attention_head_dim
    if channels < 1 or channels % 4:
        raise unsupported("attention_head_dim", config.attention_head_dim, "heads * head size a positive multiple of 4")
    if config.patch_size < 1 or config.sample_size < config.patch_size:
        raise unsupported("patch_size", config.patch_size, f"1 to sample_size = {config.sample_size}")
    if not 0 < 4 * channels <= 1 << 20 or config.in_channels < 1:
        raise CheckpointError(f"config asks for {channels} channels and {config.in_channels} input channels, which no "
                              "such model has")


class _Labels(nn.Module):
    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.embedding_table = Embedding(classes + 1, channels)  # the last is "no class", for guidance


class _Embedder(Direct):
    """Timesteps and class labels -> the sum of their embeddings."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.timestep_embedder = Sinusoids(config.channels, config.freq_shift)
        self.class_embedder = _Labels(config.num_embeds_ada_norm, config.channels)

    def forward(self, times: Tensor, labels: Tensor) -> Tensor:
        """(timesteps,), (labels,) -> (timesteps * labels, C)."""
        both = self.timestep_embedder(times)[:, None] + self.class_embedder.embedding_table(labels)
        return both.flatten(0, 1)


class _AdaLayerNormZero(nn.Module):
    emb: _Embedder | None

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.emb = _Embedder(config)
        self.linear = Linear(config.channels, 6 * config.channels)
        self.norm = LayerNorm(config.channels, 1e-6, elementwise_affine=False)


class _Block(Block):
    def __init__(self, config: DiTConfig):
        super().__init__(config.channels, config.num_attention_heads, config.activation_fn, config.attention_bias)
        self.norm1 = _AdaLayerNormZero(config)
        self.norm3 = LayerNorm(config.channels, config.norm_eps, config.norm_elementwise_affine)

    def norms(self) -> tuple[LayerNorm, LayerNorm]:
        return self.norm1.norm, self.norm3


class DiT(FromSingleFile, Model):
    """Peebles and Xie 2023, section 3, with adaLN-zero; SiT: Ma et al. 2024. Inference only, thread-safe: nothing is
    written to the module; what depends on the call is in the ``TransformerState`` that prepare() returns.
    """

    config_class = DiTConfig
    part = "transformer"
    segments = ("self", "mlp", "tail", "stack", "output")

    def __init__(self, config: DiTConfig):
        super().__init__(config)
        c, channels = config, config.channels
        self.pos_embed = PatchEmbed(c.in_channels, channels, c.patch_size, c.sample_size)
        self.transformer_blocks = nn.ModuleList(_Block(c) for _ in range(c.num_layers))
        self.norm_out = LayerNorm(channels, 1e-6, elementwise_affine=False)
        self.proj_out_1 = Linear(channels, 2 * channels)
        self.proj_out_2 = Linear(channels, c.patch_size**2 * (c.out_channels or c.in_channels))
        number_blocks(self, Block)

    @classmethod
    def from_weights(cls: type[T], config: Config | Mapping[str, Any],
                     weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], *, pack: bool = False,
                     **options: Any) -> T:
        """As Model.from_weights. Every block has an embedder of its own in diffusers' layout, and they are copies of
        one in every published model: a packed model keeps one of those that are equal."""
        model = super().from_weights(config, weights, pack=pack, **options)
        for network in (model, *model.variants) if pack else ():
            _share_embedders(network)
        return model

    @own_modes()
    def prepare(self, timesteps: Tensor | Sequence[float] | float, *, class_labels: Tensor | None = None
                ) -> TransformerState:
        """Computes what does not depend on the sample, for all timesteps of a call at once: the modulation of every
        block (one product a block for all timesteps and classes).

        timesteps: all network times of the call, shared by the pictures. class_labels: (N,) int; the number of classes
        stands for "no class". The result equals, bit for bit, what forward() computes from the same conditions.
        Raises ShapeError for labels that are missing or out of range.
        """
        times, labels = list(dict.fromkeys(as_list(timesteps))), self._labels(class_labels)
        distinct, which = torch.unique(labels, return_inverse=True)
        t = torch.tensor(times, dtype=torch.float64, device=self.device)
        embedded: dict[int, Tensor] = {}
        for block in self.transformer_blocks:
            emb = block.norm1.emb  # type: ignore[union-attr]
            if id(emb) not in embedded:
                embedded[id(emb)] = by_rows(F.silu, emb(t, distinct))  # type: ignore[operator]
        first = embedded[id(self.transformer_blocks[0].norm1.emb)]  # type: ignore[union-attr]
        c, shape = self.config, (len(times), len(distinct))
        last = by_rows(self.proj_out_1, first).view(*shape, 2, c.channels).transpose(1, 2)

        def rows(numbers: slice) -> Tensor:
            """(timesteps, blocks, 6, labels, C)"""
            made = []
            for block in self.transformer_blocks:
                norm: Any = block.norm1
                some = embedded[id(norm.emb)].view(*shape, c.channels)[numbers]
                wide = by_rows(norm.linear, some.flatten(0, 1)).view(*some.shape[:2], 6, c.channels)
                made.append(wide.transpose(1, 2))
            return torch.stack(made, dim=1)

        if too_many(*shape, c.num_layers, c.channels, last.dtype):
            return TransformerState({x: i for i, x in enumerate(times)}, which, None, last, batch=len(labels),
                                    at=lambda number: rows(slice(number, number + 1))[0])
        return TransformerState({x: i for i, x in enumerate(times)}, which, rows(slice(None)), last, batch=len(labels))

    @own_modes()
    def forward(self, sample: Tensor, timestep: Tensor | float, *, class_labels: Tensor | None = None,
                state: TransformerState | None = None, cache: Session | None = None,
                hooks: Hooks | None = None) -> Tensor:
        """Predicts noise and, behind it, the learned variance (or what the model was trained for).

        sample: (N, in_channels, H, W), H and W multiples of the patch size; returns (N, out_channels, H, W) in the
        model's dtype, channels-last. timestep: number, or tensor () or (N,). With ``state`` from prepare() no labels
        are given. cache, hooks: of this call. Raises ShapeError for sizes that do not fit, LdmfastError for
        contradicting arguments.
        """
        self.pos_embed.grid(sample)
        if state is None:
            state = self.prepare(timestep, class_labels=class_labels)
        elif class_labels is not None:
            raise LdmfastError("class_labels were given together with a prepared state; give one of the two")
        step = replace(state.step(timestep, len(sample)), cache=cache, hooks=hooks)
        return self.at(as_list(timestep)).run(sample, step)

    def run(self, sample: Tensor, step: Step) -> Tensor:
        x = self.pos_embed(sample.to(self.dtype))
        blocks = [partial(block, rows=rows, step=step) for block, rows in zip(self.transformer_blocks, step.rows)]
        blocks = step.kept(blocks)
        x = through(blocks, x, step.cache, partial(self._modulated, x, step.rows))
        shift, scale = step.last
        patches = self.proj_out_2(self.norm_out(x, scale, shift, self.proj_out_2))
        return unpatchify(patches, self.pos_embed.grid(sample), self.config.patch_size)

    def _modulated(self, x: Tensor, rows: Tensor) -> Tensor:
        return ops.layer_norm_modulate(x, rows[0, 1], rows[0, 0], eps=1e-6)

    def _labels(self, labels: Tensor | None) -> Tensor:
        classes = self.config.num_embeds_ada_norm
        if labels is None:
            raise ShapeError("this model is class-conditional: pass class_labels, one for each picture")
        if labels.ndim != 1 or labels.is_floating_point():
            raise ShapeError(f"class_labels has shape {tuple(labels.shape)} and dtype {labels.dtype}, needs "
                             "(pictures,) of integers")
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
            raise ShapeError(f"class_labels reach {int(labels.min())}..{int(labels.max())}, the model has classes "
                             f"0..{classes - 1}, and {classes} for none")
        return labels.to(self.device)


def _share_embedders(model: DiT) -> None:
    norms: list[Any] = [block.norm1 for block in model.transformer_blocks]
    if not norms:
        return
    first = norms[0].emb
    tensors = dict(first.named_parameters())
    for norm in norms[1:]:
        own = dict(norm.emb.named_parameters())
        if all(_equal(tensors[name], p) for name, p in own.items()):
            norm.emb = first


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to_dense() if a.is_mkldnn else a, b.to_dense() if b.is_mkldnn else b)
