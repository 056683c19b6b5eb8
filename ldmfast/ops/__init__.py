"""The op catalogue: one module a row (schema, reference, fake, cases, cost), compiled kernels loaded beneath.

``python -m ldmfast.ops`` prints which kernel of every op is live here.
"""

from __future__ import annotations

from . import _load, _op
from .attention import attention
from .geglu import geglu
from .group_norm_silu import group_norm_silu
from .layer_norm_modulate import layer_norm_modulate
from .lincomb import lincomb
from .upsample2x import upsample2x

ROWS = _op.ROWS
CPU_LIBRARY = _load.load_cpu()
CUDA_LIBRARY = _load.load_cuda()
_op.register_triton()

__all__ = [
    "attention", "geglu", "group_norm_silu", "layer_norm_modulate", "lincomb", "upsample2x",
]
