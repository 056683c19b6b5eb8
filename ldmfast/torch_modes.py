"""What a caller may have set in torch, and what it may not change: a call draws the same picture under any of it.

The default dtype is the whole process's, other threads included, so it cannot be set aside for a call: tensors are made
with a dtype of their own instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_callers_device: ContextVar[torch.device | None] = ContextVar("_callers_device", default=None)


@contextmanager
def own_modes(gradients: Callable[[], Any] = torch.no_grad) -> Iterator[None]:
    """Inside, nothing is recorded for gradients, a caller's autocast is off, and tensors are made on the CPU unless
    they say otherwise. gradients: torch.no_grad, or torch.inference_mode where only ``ordinary`` tensors get out."""
    device = torch.get_default_device()
    with ExitStack() as stack:
        stack.enter_context(gradients())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
            stack.callback(_callers_device.reset, _callers_device.set(device))
        yield


def outside(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls what the caller gave, a callback, as diffusers would: without gradients, which it may enable, and with the
    caller's default device."""
    device = _callers_device.get()
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        if device is not None:
            stack.enter_context(device)
        return function(*arguments)


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as one that gradients may flow through and that may be changed in place, as those of no_grad() may."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
