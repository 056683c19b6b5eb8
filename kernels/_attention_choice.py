"""Which kernel a call of ``attention`` on a GPU runs: one of ours in CUDA C++, ours in Triton, or torch's own.

Nothing here was timed: the table says what published figures and the count of products let expect, and each row why.
``bench/gpu_attention.py`` times all of them on a GPU and prints the rows that this table should have.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_log = logging.getLogger("ldmfast")
KERNELS = {"mma": 0, "wgmma": 1}  # the numbers of csrc/cuda/attention.cu
DEPTHS = {"mma": frozenset((40, 72, 80, 160)), "wgmma": frozenset((40, 64, 72, 80, 128, 160))}  # compiled there
CHIPS = {"mma": ((8, 0), (99, 0)), "wgmma": ((9, 0), (9, 1))}  # compute capability: least, below


@dataclass(frozen=True)
class Rule:
    """One row: the calls that ``backend`` takes. masks: "none", "causal" (queries and keys of one number) or "block"
    (any other causal mask). chips: compute capability, least and below."""

    backend: str
    depths: frozenset[int]
    chips: tuple[tuple[int, int], tuple[int, int]]
    masks: frozenset[str]
    reason: str
    least_blocks: int = 0  # of 128 queries of a head; of one picture: a result must not depend on its batch

    def takes(self, depth: int, mask: str, capability: tuple[int, int], blocks: int) -> bool:
        fits = depth in self.depths and mask in self.masks and blocks >= self.least_blocks
        return fits and self.chips[0] <= capability < self.chips[1]


@dataclass(frozen=True)
class Choice:
    backend: str  # "wgmma", "mma", "sdpa" or "triton"
    reason: str


_ANY, _PLAIN = frozenset(("none", "causal", "block")), frozenset(("none", "causal"))
_ODD, _ALL = DEPTHS["mma"], DEPTHS["wgmma"]
RULES = (
    Rule("wgmma", _ODD, CHIPS["wgmma"], _ANY, "FlashAttention pads 40 to 64, 72 to 96, 160 to 192; this does not", 33),
    Rule("mma", _ODD, CHIPS["mma"], _ANY, "FlashAttention pads 40 to 64, 72 to 96, 160 to 192; this does not"),
    Rule("sdpa", frozenset((64, 96, 128)), CHIPS["mma"], _PLAIN,
         "cuDNN's and FlashAttention's kernels are tuned for this depth; ours were not timed"),
    Rule("wgmma", _ALL, CHIPS["wgmma"], _ANY, "torch has no such mask without a tensor of it"),
)


def in_place(x: Tensor) -> bool:
    """Whether the CUDA kernels can read x as it lies: rows on 16 bytes, and no dimension that is only expanded."""
    free = all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in zip(x.shape[:3], x.stride()[:3]))
    return free and x.stride(3) == 1 and x.data_ptr() % 16 == 0


def mask_kind(queries: int, keys: int, causal: bool, block_size: int) -> str:
    return "none" if not causal else "causal" if queries == keys and block_size == 1 else "block"


def choose(depth: int, depth_v: int, queries: int, keys: int, dtype: torch.dtype, capability: tuple[int, int], *,
           heads: int, grouped: bool = False, biased: bool = False, causal: bool = False, block_size: int = 1,
           scale: float = 1.0, readable: bool = True, built: bool = True) -> Choice:
    """grouped: fewer key heads than query heads; readable: ``in_place`` for q, k and v; built: the CUDA library."""
    if biased:
        return Choice("triton", "the CUDA kernels add no bias")
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice("triton", f"the CUDA kernels take bfloat16 and float16, not {str(dtype)[6:]}")
    if depth != depth_v or scale <= 0:
        return Choice("triton", "the CUDA kernels take one depth for q, k and v, and a scale above 0")
    mask = mask_kind(queries, keys, causal, block_size)
    why = f"no rule for head dimension {depth} with mask {mask!r} on compute capability {capability}"
    for rule in RULES:
        if not rule.takes(depth, mask, capability, -(-queries // 128) * heads):
            continue
        if rule.backend == "sdpa":
            if not grouped:
                return Choice("sdpa", rule.reason)
            why = "torch's fast kernels differ in whether they take grouped heads"
        elif not built:
            why = "the CUDA library is not loaded"
        elif not readable:
            why = "q, k or v has rows that do not start on 16 bytes, or an expanded dimension"
        else:
            return Choice(rule.backend, rule.reason)
    return Choice("triton", why)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _built() -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("ldmfast::attention_cuda", "CUDA")


@cache
def _tell(depth: int, choice: Choice) -> None:
    _log.info("attention, head dimension %d: %s (%s)", depth, choice.backend, choice.reason)


def choice_of(q: Tensor, k: Tensor, v: Tensor, biased: bool, scale: float, causal: bool, block_size: int) -> Choice:
    """The choice for these tensors, told once a head dimension and reason to the logger "ldmfast" (level INFO)."""
    if not q.is_cuda:
        return Choice("triton", "not on a GPU: interpreted, or compiled only")
    choice = choose(q.shape[3], v.shape[3], q.shape[1], k.shape[1], q.dtype, _capability(q.get_device()),
                    heads=q.shape[2], grouped=q.shape[2] != k.shape[2], biased=biased, causal=causal,
                    block_size=block_size, scale=scale,
                    readable=in_place(q) and in_place(k) and in_place(v), built=_built())
    _tell(q.shape[3], choice)
    return choice


def able(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool, block_size: int,
         capability: tuple[int, int], built: bool) -> list[str]:
    """Every backend that could run this call, for checks and benchmarks."""
    found = ["triton"]
    if bias is not None or q.dtype not in (torch.bfloat16, torch.float16):
        return found
    if q.shape[2] == k.shape[2] and mask_kind(q.shape[1], k.shape[1], causal, block_size) in _PLAIN:
        found.append("sdpa")
    fits = q.shape[3] == v.shape[3] and scale > 0 and in_place(q) and in_place(k) and in_place(v)
    return found + [name for name in KERNELS if built and fits and q.shape[3] in DEPTHS[name]
                    and CHIPS[name][0] <= capability < CHIPS[name][1]]


def run(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, block_size: int) -> Tensor:
    """One of the backends that is not Triton; k has at least one key. Returns (B, Tq, H, D), dense."""
    if backend == "sdpa":
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, scale=scale)
        return out.transpose(1, 2).contiguous()
    return torch.ops.ldmfast.attention_cuda(q, k, v, scale, causal, block_size, KERNELS[backend])
