"""attention_fp8: attention whose four factors are e4m3 numbers; less exact than attention, and asked for by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import LdmfastError, PrecisionError
from . import quantize_rowwise as rowwise
from ._faults import public
from ._op import Case, Cost, Draw, Op, accumulator, case, register
from .attention import _check
from .attention import cases as plain_cases
from .attention import cost as plain_cost
from .attention import fake as plain_fake
from .attention import peer as plain_peer
from .attention import reference as plain_reference

LEAST_CHIP = (8, 9)  # compute capability: the first whose matrix units take e4m3


def centred(k: Tensor) -> Tensor:
    """Keys less their mean over the tokens, which moves all scores of a query alike and so changes no result, but takes
    away what most costs exactness in 8 bits (Zhang et al., "SageAttention", 2024, section 4.2). k: (B, T, H, D), T > 0;
    fp32, or fp64 for fp64."""
    wide = k.to(accumulator(k))
    return wide - wide.mean(1, keepdim=True)


def columns(v: Tensor) -> Tensor:
    """Values with their tokens last, (B, H, D, T): a scale for each channel of a head then is one for each row."""
    return v.permute(0, 2, 3, 1)


def rounded(x: Tensor) -> Tensor:
    """What the e4m3 codes of x's rows stand for."""
    codes, scale = rowwise.reference(x, True)
    return codes.to(accumulator(x)) * scale.unsqueeze(-1)


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, block_size: int) -> Tensor:
    """With q, k and v rounded; the kernel rounds its weights, too, each by at most 1/16 of itself."""
    if k.shape[1] == 0 or q.numel() == 0:
        return plain_reference(q, k, v, None, scale, causal, block_size)
    values = rounded(columns(v)).permute(0, 3, 1, 2)
    y = plain_reference(rounded(q), rounded(centred(k)), values, None, scale, causal, block_size)
    return y.to(q.dtype)


def peer(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, block_size: int) -> Tensor:
    return plain_peer(q, k, v, None, scale, causal, block_size)


def fake(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, block_size: int) -> Tensor:
    return plain_fake(q, k, v, None, scale, causal, block_size)


def cost(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, block_size: int) -> Cost:
    return plain_cost(q, k, v, None, scale, causal, block_size)


def cases() -> Iterator[Case]:
    def make(old: Case) -> Any:
        def draw(d: Draw) -> tuple[Any, ...]:
            q, k, v, _, *rest = old.make(d)
            return q, k, v, *rest
        return draw

    few = {"sdxl_4096x64", "sd15_cross_256x77x160", "packed_qkv", "grouped_heads", "causal_longer_queries",
           "block_causal", "one_key", "keys_129", "sharp", "far_below_the_bound", "misaligned", "no_batch", "no_keys"}
    for old in plain_cases():
        if old.name in few:
            yield case(old.name, " ".join(old.tags), make(old))


_call = register(Op("attention_fp8", "(Tensor q, Tensor k, Tensor v, float scale, bool causal, int block_size) "
                    "-> Tensor", reference, fake, cases, cost, peer, gpu_only=True))


@public
def attention_fp8(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False,
                  block_size: int = 1) -> Tensor:
    """attention(q, k, v, ...) without a bias, its factors rounded to e4m3 (Shah et al. 2024, section 3.3): q and the
    keys less their mean with a scale for each token of a head, v with one for each channel of a head, the weights of
    the softmax with one for all. On numbers from a normal distribution the result is 4 to 6% off (root mean square).

    Arguments and result as in ``ops.attention``. For GPUs of compute capability 8.9 and newer: on a CPU the reference
    runs. Raises PrecisionError on older GPUs, and as ``ops.attention``.
    """
    _check(q, k, v)
    if block_size < 1:
        raise LdmfastError(f"attention_fp8: block_size is {block_size}, needs at least 1 (1: plain causal mask)")
    if q.is_cuda and (found := torch.cuda.get_device_capability(q.device)) < LEAST_CHIP:
        raise PrecisionError(f"attention_fp8: needs a GPU of compute capability 8.9 or newer, {q.device} has "
                             f"{found[0]}.{found[1]}: use ops.attention")
    return _call(q, k, v, max(q.shape[3], 1) ** -0.5 if scale is None else scale, causal, block_size)
