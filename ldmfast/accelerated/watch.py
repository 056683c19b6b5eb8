"""Has a diffusers model changed since it was looked at? Asked before every call, so it costs microseconds a module.

Whatever a user can do to a model from outside (hooks, LoRA layers, attention processors, FreeU, another dtype, new
weights) shows in attributes, children, hooks, or in where the weights are and what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

_SAMPLES = 8  # numbers of each tensor that are compared where a copy of the weights was made


class Structure:
    """The modules under ``root`` (not itself) with their attributes, children and hooks, and root's config.

    Holds no reference to root, so that a model is freed as soon as its user lets go of it.
    """

    def __init__(self, root: nn.Module):
        self.root = _root(root)
        modules = [m for m in root.modules() if m is not root]
        self.children: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (m._modules, dict(m._modules)) for m in (root, *modules) if m._modules]
        self.attributes = [(m, dict(vars(m))) for m in modules]
        self.rest = self._rest()
        # processors are small objects that attention modules call; they carry settings of their own
        processors = {id(p): p for p in (vars(m).get("processor") for m in modules) if hasattr(p, "__dict__")}
        self.processors = [(p, dict(vars(p))) for p in processors.values()]

    def _rest(self) -> list[tuple[type, int, int]]:
        return [(type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m, _ in self.attributes]

    def holds(self, root: nn.Module) -> bool:
        try:
            # dictionaries compare their values by identity first, so only what changed is looked at
            return (_root(root) == self.root
                    and all(now == then for now, then in self.children)
                    and all(vars(m) == then for m, then in self.attributes)
                    and all(vars(p) == then for p, then in self.processors)
                    and self._rest() == self.rest)
        except (RuntimeError, ValueError, TypeError):  # values without a plain ==, such as tensors
            return False


def _root(root: nn.Module) -> tuple[Any, ...]:
    # global hooks of torch run for every module, also for those that are skipped
    hooks = len(torch_modules._global_forward_hooks), len(torch_modules._global_forward_pre_hooks)
    return type(root), type(root).forward, id(vars(root).get("_internal_dict")), *hooks


class Weights:
    """Where the tensors of a model are. copied: whether packed copies were made of them, which must not grow stale;
    then also their versions and a few of their numbers, because ``.data`` can be written without a trace.
    """

    def __init__(self, model: nn.Module, copied: bool):
        self.owners = _owners(model)
        self.copied = copied
        self.where = self._where()
        # views keep the storage, so that an address cannot come to mean another tensor
        self.views = [_sample(t.detach()) for t in self.tensors()] if copied else []
        self.numbers = self._numbers()

    def tensors(self) -> Iterator[Tensor]:
        return (t for d in self.owners for t in d.values() if t is not None)

    def _where(self) -> list[Any] | None:
        try:
            if self.copied:
                return [(t.data_ptr(), t.dtype, t.shape, None if t.is_inference() else t._version)
                        for t in self.tensors()]
            return [(t.data_ptr(), t.dtype, t.shape) for t in self.tensors()]
        except RuntimeError:  # tensors without storage: quantised ones, or inside a transform of torch.func
            return None

    def _numbers(self) -> Tensor | None:
        return torch.cat(self.views) if self.views else None

    def are_of(self, model: nn.Module) -> bool:
        """Whether the model's modules are still those that were looked at: one may have been replaced by its like."""
        now = _owners(model)
        return len(now) == len(self.owners) and all(a is b for a, b in zip(now, self.owners))

    def hold(self) -> bool:
        if self.where is None or self._where() != self.where:
            return False
        now = self._numbers()
        return now is None or self.numbers is None or _same_bits(now, self.numbers)


def _owners(model: nn.Module) -> list[dict[str, Any]]:
    return [d for m in model.modules() for d in (m._parameters, m._buffers) if d]


def _sample(t: Tensor) -> Tensor:
    """A view of some numbers of t, whatever its strides are: in the order of its storage."""
    count = min(_SAMPLES, t.numel())
    behind = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    if behind < t.numel():  # expanded
        return t[(slice(0, 1),) * t.ndim].flatten()
    return t.as_strided((count,), (t.numel() // max(1, count),))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())
