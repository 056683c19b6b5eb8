"""Perturbed-attention guidance: away from what the network predicts where tokens do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .guide import COND, Branch, Call, Guidance, Terms
from .perturb import Perturb, check_layers
from .scaled import check_number, check_range


@dataclass(frozen=True)
class Identity(Perturb):
    """Every token of the picture attends to itself alone, and to the text if there is any in the same sequence."""

    guidance: ClassVar[str] = "PAG"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, text: int, size: tuple[int, int]) -> Tensor:
        if not text:
            return v
        queries, keys = q.shape[1], k.shape[1]
        own = torch.zeros(queries, keys, dtype=q.dtype, device=q.device)
        picture = keys - text
        own[queries - picture:, text:] = -torch.inf
        own[queries - picture:, text:].fill_diagonal_(0.0)
        return ops.attention(q, k, v, bias=own[None, None])


@dataclass(frozen=True, kw_only=True)
class PAG(Guidance):
    """Adds scale * (cond - perturbed): in the self-attention of ``layers`` the map is the identity (Ahn et al. 2024,
    "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", eq. 12). One branch more in the batch.
    Defaults are those of diffusers' PAG pipelines.

    layers: names of self-attentions, or patterns in them, as pag_applied_layers. adaptive_scale: the scale falls by
    this much for each unit of time below 1000, not under 0 (pag_adaptive_scale). start, stop: fractions of the steps.
    """

    scale: float = 3.0
    layers: str | Sequence[str] = ("mid",)
    adaptive_scale: float = 0.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_number("scale", self.scale)
        check_number("adaptive_scale", self.adaptive_scale, 0.0)
        check_range(self.start, self.stop)

    def terms(self, call: Call) -> Terms:
        times = np.asarray(call.table.network_times)
        scale: np.ndarray = np.full(len(times), float(self.scale))
        if self.adaptive_scale:
            scale = np.maximum(scale - self.adaptive_scale * (1000 - times), 0.0)
        on = scale * call.within(self.start, self.stop)
        return {Branch("perturbed", perturb=Identity(tuple(self.layers))): -on, COND: on}
