"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .guide import COND, UNCOND, Array, Branch, Call, Terms
from .scaled import Scaled


@dataclass(frozen=True, kw_only=True)
class CFG(Scaled):
    """e = uncond + scale * (cond - uncond) (Ho and Salimans 2022, eq. 6). Linear: it becomes part of the step table.
    With ``rescale`` it does not (Lin et al. 2024, eq. 15-16)."""

    def terms(self, call: Call) -> Terms:
        w = self.scales(call)
        return {UNCOND: 1 - w, COND: w - 1}

    def reads(self, call: Call) -> Mapping[Branch, Array]:
        return {COND: self.scales(call) != 1} if self.rescale else {}
