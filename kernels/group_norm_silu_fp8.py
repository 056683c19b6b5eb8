"""group_norm_silu_fp8: group_norm_silu straight to e4m3 codes under a given scale."""

from __future__ import annotations

import torch
from torch import Tensor

from .group_norm_silu import Config, layout_of, start


def launch(x: Tensor, shift: Tensor | None, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
           silu: bool, scale: Tensor, *, config: Config | None = None) -> Tensor:
    """Arguments as in group_norm_silu; scale: fp32 (1,) -> float8_e4m3fn codes of x's shape and layout."""
    q = torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=layout_of(x))
    start(x, q.view(torch.uint8), scale, shift, num_groups, weight, bias, eps, silu, config)
    return q
