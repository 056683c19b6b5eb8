"""layer_norm_modulate_rows: layer_norm_modulate straight to int8 or e4m3 codes with a scale for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer_norm_modulate import Config, start


def launch(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, bias: Tensor | None,
           eps: float, fp8: bool, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Arguments as in layer_norm_modulate -> codes of x's shape (int8, or float8_e4m3fn), dense, and scales (..., T)
    in fp32."""
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn if fp8 else torch.int8)
    row_scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if q.numel() == 0:
        return q, row_scale.fill_(1.0)
    start(x, q.view(torch.uint8), row_scale, scale, shift, weight, bias, eps, fp8, config)
    return q, row_scale
