"""ldmfast: run latent diffusion at the speed the hardware allows.

    pipe = ldmfast.Pipeline.tiny()
    pipe("a red circle above a blue square", generator=0).images[0].save("demo.png")

Sub-modules are imported on first use, so that ``import ldmfast`` costs little over ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, DeviceError, LdmfastError, PrecisionError, ShapeError

if TYPE_CHECKING:
    from . import caches, checkpoints, guidance, models, ops, pipelines, samplers, tuning
    from ._info import info
    from .accelerated import accelerate, restore
    from .pipelines import Pipeline

__version__ = "0.1.0"

__all__ = [
    "CheckpointError", "DeviceError", "LdmfastError", "Pipeline", "PrecisionError", "ShapeError",
    "__version__", "accelerate", "caches", "checkpoints", "guidance", "info", "models", "ops",
    "pipelines", "restore", "samplers", "tuning",
]

_LAZY = {"Pipeline": "pipelines", "info": "_info", "accelerate": "accelerated", "restore": "accelerated"}
_MODULES = ("caches", "checkpoints", "guidance", "models", "ops", "pipelines", "samplers", "tuning")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module 'ldmfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
