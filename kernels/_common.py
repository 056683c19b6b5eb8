"""What the launchers share: device facts, strides, block sizes."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

ASSUMED_PROCESSORS = 132  # H100 and H200; used where no GPU is asked (interpreter, compile checks)


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: Tensor) -> int:
    """Multiprocessors of the tensor's GPU."""
    return _processors(x.get_device()) if x.is_cuda else ASSUMED_PROCESSORS


@cache
def _shared_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that one block of the tensor's GPU may use."""
    return _shared_memory(x.get_device()) if x.is_cuda else 163 * 1024  # sm_80, the least of the data-centre chips


def accumulator(x: Tensor) -> tl.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def power_of_two(n: int) -> int:
    return triton.next_power_of_2(max(n, 1))


def collapsed(x: Tensor, first: int, last: int) -> int | None:
    """The one stride that walks dimensions first..last-1 of x in order, or None if there is no such stride."""
    stride, expected = 1, None
    for size, step in zip(reversed(x.shape[first:last]), reversed(x.stride()[first:last])):
        if size == 1:
            continue
        if expected is None:
            stride, expected = step, step * size
        elif step != expected:
            return None
        else:
            expected = step * size
    return stride


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x (..., C) as rows with adjacent elements: x itself, or a copy where no single stride reaches them."""
    stride = collapsed(x, 0, x.ndim - 1)
    if stride is None or (x.shape[-1] > 1 and x.stride(-1) != 1):
        x = x.contiguous()
        return x, x.shape[-1]
    if x.numel() == x.shape[-1]:  # one row: its stride is never used, and 1 would only specialise the kernel
        return x, x.shape[-1]
    return x, stride
