"""swiglu: out[r, d] = x[r, d] * silu(x[r, D + d]) with silu(g) = g / (1 + exp(-g))."""

from __future__ import annotations

from torch import Tensor

from ._gated import Config, gated


def launch(x: Tensor, *, config: Config | None = None) -> Tensor:
    """x: (..., 2 D) floating -> (..., D), contiguous."""
    return gated(x, "silu", config)
