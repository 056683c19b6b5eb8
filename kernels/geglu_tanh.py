"""geglu_tanh: out[r, d] = x[r, d] * gelu(x[r, D + d]) with GELU's tanh approximation."""

from __future__ import annotations

from torch import Tensor

from ._gated import Config, gated


def launch(x: Tensor, *, config: Config | None = None) -> Tensor:
    """x: (..., 2 D) floating -> (..., D), contiguous."""
    return gated(x, "gelu_tanh", config)
