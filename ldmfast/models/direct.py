"""Calling a module at inference without torch's bookkeeping."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _torch


def hooked(m: nn.Module) -> bool:
    """Whether a call of m has to pass forward hooks, its own or those for all modules."""
    return bool(m._forward_hooks or m._forward_pre_hooks or _torch._global_forward_hooks
                or _torch._global_forward_pre_hooks)


def watched(m: nn.Module) -> bool:
    """Whether what m computes has to go through a call of m: it has hooks, or a forward of its own."""
    return hooked(m) or "forward" in vars(m)


class Direct(nn.Module):
    """Calls forward() at once unless forward hooks are registered, on this module or for all.

    torch's own call also looks for backward hooks, tracing and compiled calls, which costs 0.6 us: a tenth of a small
    network's time, which has hundreds of modules a step.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if hooked(self):
            return super().__call__(*args, **kwargs)
        return self.forward(*args, **kwargs)
