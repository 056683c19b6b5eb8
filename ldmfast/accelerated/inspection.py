"""Is a diffusers model still what its config says? Only then may the native network stand in for it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

_INTERNAL = frozenset(vars(nn.Module())) | {"forward"}
# change nothing at inference; dropout is looked at by itself
_HARMLESS = frozenset({"gradient_checkpointing", "_gradient_checkpointing_func", "_old_forward", "_hf_hook"})
# processors that compute softmax(q k^T / sqrt(d)) v and nothing else
_PLAIN_ATTENTION = frozenset({"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"})
_PLAIN_JOINT = frozenset({"JointAttnProcessor2_0", "FluxAttnProcessor"})  # the same over two streams of tokens
_HINTS = {**dict.fromkeys(("s1", "s2", "b1", "b2"), "FreeU"),
          "fused_projections": "fuse_qkv_projections, which diffusers never takes back whole"}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Blueprint:
    """The module types and attributes that a model's class and config make, read from a copy without weights."""

    def __init__(self, model: Any):
        self.config = model.config
        with torch.device("meta"):
            fresh = type(model).from_config(model.config)
        self.modules = {path: (type(m), _attributes(m)) for path, m in fresh.named_modules()}

    def difference(self, model: nn.Module, whole: bool) -> str | None:
        """The first way in which the model is not the one of its config, in words, or None.

        whole: the model's own attributes count, too (they do not where only its parts are replaced)."""
        if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
            return "torch has global forward hooks"
        seen = 0
        for path, module in model.named_modules():
            wanted = self.modules.get(path)
            found = (_root_difference(module, wanted) if not path and wanted and whole
                     else _module_difference(path, module, wanted) if path else None)
            if found is not None:
                return found
            seen += 1
        if seen != len(self.modules):
            return "modules of the config are missing"
        return _unusable_weights(model)


def _module_difference(path: str, module: nn.Module, wanted: tuple[type, dict[str, Any]] | None) -> str | None:
    kind = type(module)
    if wanted is None or wanted[0] is not kind:
        name = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
        return f"{path!r} is {name}" + (" (LoRA layers)" if "lora" in kind.__module__.lower() else "")
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{path!r} has a forward hook"
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__func__", forward) is not kind.forward and not _ours(forward):
        return f"{path!r} has a forward of its own (a hook, of offloading or of a cache)"
    if isinstance(module, nn.Dropout) and module.training and module.p > 0:
        return "dropout is active in train() mode"
    if kind.__name__ == "LabelEmbedding" and module.training and getattr(module, "dropout_prob", True):
        return "class labels are dropped in train() mode"
    return _changed(f"{path}.", _attributes(module), wanted[1])


def _root_difference(root: nn.Module, wanted: tuple[type, dict[str, Any]]) -> str | None:
    known = {k: v for k, v in wanted[1].items() if not k.startswith("_")}
    return _changed("", {k: v for k, v in _attributes(root).items() if k in known}, known)


def _changed(path: str, now: dict[str, Any], then: dict[str, Any]) -> str | None:
    for key in [*then, *(k for k in now if k not in then)]:
        a, b = now.get(key), then.get(key)
        if key == "processor" and ((_plain(a, _PLAIN_ATTENTION) and _plain(b, _PLAIN_ATTENTION))
                                   or (type(a) is type(b) and _plain(a, _PLAIN_JOINT))):
            continue
        if not _same(a, b):
            hint = f" ({_HINTS[key]})" if key in _HINTS else ""
            return f"{path + key!r} was changed{f' to {type(a).__name__}' if key == 'processor' and a else hint}"
    return None


def _attributes(module: nn.Module) -> dict[str, Any]:
    found = dict(vars(module))
    if "processor" in module._modules:  # one with weights, such as IP-Adapter's
        found["processor"] = module._modules["processor"]
    return {k: v for k, v in found.items()
            if k not in _INTERNAL and k not in _HARMLESS and not _empty_registry(k, v)}


def _empty_registry(key: str, value: Any) -> bool:
    """diffusers' registry stays in a module when the last hook is taken out (``disable_cache``)."""
    return key == "_diffusers_hook" and not getattr(value, "hooks", True)


def _plain(processor: Any, kinds: frozenset[str]) -> bool:
    settings = vars(processor) if hasattr(processor, "__dict__") else {}
    return (type(processor).__name__ in kinds and type(processor).__module__.startswith("diffusers.")
            and settings.get("_attention_backend") is None)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, (Tensor, nn.Module)):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, functools.partial):
        return a.func is b.func and a.args == b.args and a.keywords == b.keywords
    if isinstance(a, (dict, set, str, int, float, torch.Size, torch.dtype, torch.device)):
        return bool(a == b)
    return hasattr(a, "__dict__") and not callable(a) and _same(vars(a), vars(b))


def _ours(forward: Any) -> bool:
    return type(forward).__module__.startswith(__package__)


def _unusable_weights(model: nn.Module) -> str | None:
    kinds = {}
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if type(t) not in (Tensor, nn.Parameter):
            return f"{name!r} is a {type(t).__name__}"
        if t.is_meta:
            return f"{name!r} is on the meta device"
        if t.is_floating_point():
            kinds[t.dtype, t.device] = name
    if len(kinds) > 1:
        return "weights are of several dtypes or devices: " + ", ".join(f"{d} on {at}" for d, at in kinds)
    if kinds and next(iter(kinds))[0] not in _DTYPES:
        return f"weights are {next(iter(kinds))[0]}"
    return None
