"""CFG-Zero*: classifier-free guidance from the best multiple of the unconditional prediction, after a standstill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import LdmfastError
from .guide import COND, UNCOND, Array, At, Branch, Call, Outs, Terms, exact
from .scaled import Scaled


@dataclass(frozen=True, kw_only=True)
class CFGZero(Scaled):
    """e = s uncond + scale * (cond - s uncond) with s = <cond, uncond> / |uncond|^2 of each picture, and nothing at all
    in the first ``zero_init_steps`` steps (Fan et al. 2025, "CFG-Zero*: Improved Classifier-Free Guidance for Flow
    Matching Models", algorithm 1). These evaluations cost nothing.

    zero_init_steps: None is 1 for a network that predicts a velocity, as in diffusers, and 0 for others: that no
    picture moves is what a prediction of zero means for a velocity only.
    """

    zero_init_steps: int | None = None

    linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.zero_init_steps
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0):
            raise LdmfastError(f"zero_init_steps={n!r} is not a whole number of at least 0")

    def still(self, call: Call) -> Array:
        """(stages,) bool: the prediction is zero. Raises LdmfastError where that means something else."""
        flow = call.prediction == "flow_prediction"
        n = int(flow) if self.zero_init_steps is None else self.zero_init_steps
        if n and not flow:
            raise LdmfastError(f"zero_init_steps={n} is for networks that predict a velocity, this one predicts "
                               f"{call.prediction}: leave it out")
        return call.step < n

    def terms(self, call: Call) -> Terms:
        return {COND: np.where(self.still(call), -1.0, self.instead(self.scales(call))[COND])}

    def reads(self, call: Call) -> Mapping[Branch, Array]:
        on = ~self.still(call)
        return {branch: reads & on for branch, reads in self.both(self.scales(call)).items()}

    def combine(self, e: Tensor | None, outs: Outs, at: At) -> Tensor | None:
        w = float(self.scales(at.call)[at.stage])
        if self.still(at.call)[at.stage] or w == 1:
            return e
        cond, uncond = exact(outs[COND]), exact(outs[UNCOND])
        a, b = cond.flatten(1), uncond.flatten(1)
        best = (a * b).sum(1) / (b.square().sum(1) + 1e-8)
        uncond = uncond * best.view(-1, *[1] * (cond.ndim - 1))
        return torch.lerp(uncond, cond, w)
