"""Adaptive projected guidance: what points along the conditional prediction is weighed apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .guide import COND, UNCOND, Array, At, Branch, Call, Outs, Terms, exact
from .scaled import Scaled, check_number


@dataclass(frozen=True, kw_only=True)
class APG(Scaled):
    """e = uncond + scale * (d_orthogonal + eta * d_parallel) of d = cond - uncond, the parts along and across the
    conditional prediction, picture by picture (Sadat et al. 2024, "Eliminating Oversaturation and Artifacts of High
    Guidance Scales in Diffusion Models", algorithm 1), on the network's predictions and with the defaults of diffusers.

    momentum: d is first added to this multiple of its sum so far; negative numbers push away from it. norm_threshold:
    the norm of d is held under it, 0 for no limit. eta: weight of the parallel part, which saturates.
    """

    momentum: float | None = None
    norm_threshold: float = 15.0
    eta: float = 1.0

    linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("norm_threshold", self.norm_threshold, 0.0)
        check_number("eta", self.eta)
        if self.momentum is not None:
            check_number("momentum", self.momentum)

    @property
    def remembers(self) -> bool:
        return self.momentum is not None

    def terms(self, call: Call) -> Terms:
        return self.instead(self.scales(call))

    def reads(self, call: Call) -> Mapping[Branch, Array]:
        return self.both(self.scales(call))

    def combine(self, e: Tensor | None, outs: Outs, at: At) -> Tensor | None:
        w = float(self.scales(at.call)[at.stage])
        if w == 1:
            return e
        cond, uncond = exact(outs[COND]), exact(outs[UNCOND])
        d, dims = cond - uncond, list(range(1, cond.ndim))
        if self.momentum is not None:
            if "sum" in at.memory:
                d = d + self.momentum * at.memory["sum"]
            at.memory["sum"] = d
        if self.norm_threshold > 0:
            norm = torch.linalg.vector_norm(d, dim=dims, keepdim=True)
            d = d * (self.norm_threshold / norm).clamp(max=1.0)
        along = cond.double()
        along = along / torch.linalg.vector_norm(along, dim=dims, keepdim=True).clamp(min=1e-12)
        parallel = ((d.double() * along).sum(dims, keepdim=True) * along).to(d.dtype)
        return uncond + w * (d - parallel + self.eta * parallel)
