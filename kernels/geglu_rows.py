"""geglu_rows: geglu straight to int8 or e4m3 codes with a scale for each row."""

from __future__ import annotations

from torch import Tensor

from ._gated import Config, gated_rows


def launch(x: Tensor, fp8: bool, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """x: (..., 2 D) floating -> codes (..., D) (int8, or float8_e4m3fn), dense, and scales (...) in fp32."""
    return gated_rows(x, "gelu", fp8, config)
