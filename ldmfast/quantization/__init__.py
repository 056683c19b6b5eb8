"""Which layers of a network run in 8 bits: plans, their measurement, and the file that stores both."""

from __future__ import annotations

from typing import Any

from .plan import Plan, Range, can_be_int8, choose

__all__ = ["Plan", "Range", "can_be_int8", "choose", "quantize"]


def __getattr__(name: str) -> Any:
    if name == "quantize":  # needs pipelines, which need plans
        from .calibrate import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
