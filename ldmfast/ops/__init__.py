"""The op catalogue: one module a row (schema, reference, fake, cases, cost), compiled kernels loaded beneath.

``python -m ldmfast.ops`` prints which kernel of every op is live here.
"""

from __future__ import annotations

from . import _load, _op
from .attention import attention
from .attention_fp8 import attention_fp8
from .conv2d import conv2d
from .conv2d_q8 import conv2d_q8
from .gate_residual import gate_residual
from .geglu import geglu
from .geglu_q8 import geglu_q8
from .geglu_rows import geglu_rows
from .geglu_tanh import geglu_tanh
from .group_norm_silu import group_norm_silu
from .group_norm_silu_fp8 import group_norm_silu_fp8
from .group_norm_silu_q8 import group_norm_silu_q8
from .kv_append import kv_append
from .kv_gather import kv_gather
from .layer_norm_modulate import layer_norm_modulate
from .layer_norm_modulate_q8 import layer_norm_modulate_q8
from .layer_norm_modulate_rows import layer_norm_modulate_rows
from .lincomb import lincomb
from .linear_geglu import linear_geglu
from .linear_geglu_q8 import linear_geglu_q8
from .linear_gelu_tanh import linear_gelu_tanh
from .linear_gelu_tanh_q8 import linear_gelu_tanh_q8
from .norm_conv2d import norm_conv2d
from .norm_conv2d_q8 import norm_conv2d_q8
from .pack_weight import pack_weight
from .philox_normal import philox_normal
from .qk_norm_rope import qk_norm_rope
from .quantize import quantize
from .quantize_rowwise import quantize_rowwise
from .rms_norm import rms_norm
from .swiglu import swiglu
from .upsample2x import upsample2x

ROWS = _op.ROWS
CPU_LIBRARY = _load.load_cpu()
CUDA_LIBRARY = _load.load_cuda()
_op.register_triton()

__all__ = [
    "attention", "attention_fp8", "conv2d", "conv2d_q8", "gate_residual", "geglu", "geglu_q8", "geglu_rows",
    "geglu_tanh", "group_norm_silu", "group_norm_silu_fp8", "group_norm_silu_q8", "kv_append", "kv_gather",
    "layer_norm_modulate", "layer_norm_modulate_q8", "layer_norm_modulate_rows", "lincomb", "linear_geglu",
    "linear_geglu_q8", "linear_gelu_tanh", "linear_gelu_tanh_q8", "norm_conv2d", "norm_conv2d_q8", "pack_weight",
    "philox_normal", "qk_norm_rope", "quantize", "quantize_rowwise", "rms_norm", "swiglu", "upsample2x",
]
