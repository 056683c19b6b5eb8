"""Tangential guidance: the unconditional prediction without what is across the direction both predictions share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .guide import COND, UNCOND, Array, At, Branch, Call, Outs, Terms, exact
from .scaled import Scaled


@dataclass(frozen=True, kw_only=True)
class TangentialCFG(Scaled):
    """Classifier-free guidance from the unconditional prediction's projection on the first right singular vector of
    the pair (Kwon et al. 2025, "TCFG: Tangential Damping Classifier-free Guidance", algorithm 1)."""

    linear: ClassVar[bool] = False

    def terms(self, call: Call) -> Terms:
        return self.instead(self.scales(call))

    def reads(self, call: Call) -> Mapping[Branch, Array]:
        return self.both(self.scales(call))

    def combine(self, e: Tensor | None, outs: Outs, at: At) -> Tensor | None:
        w = float(self.scales(at.call)[at.stage])
        if w == 1:
            return e
        cond, uncond = exact(outs[COND]), exact(outs[UNCOND])
        rows = torch.stack([cond.flatten(1), uncond.flatten(1)], dim=1).double()
        # the first right singular vector, from the eigenvectors of the 2x2 products: no decomposition of long rows
        _, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
        shared = torch.nn.functional.normalize((vectors[..., -1:].transpose(1, 2) @ rows)[:, 0], dim=1)
        kept = ((rows[:, 1] * shared).sum(1, keepdim=True) * shared).view_as(uncond).to(uncond.dtype)
        return torch.lerp(kept, cond, w)
