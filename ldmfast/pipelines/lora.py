"""LoRA in a pipeline: diffusers' methods, the adapters of a call, and the networks for each of its pictures."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import loras
from ..errors import LdmfastError, ShapeError
from ..loras.scales import as_weight
from ..models import Model, UNet2D, UNet2DCondition
from ..ops._heap import keep_freed_memory
from ..torch_modes import own_modes

if TYPE_CHECKING:
    from .load import Components
    from .pipeline import Pipeline
    from .request import Request
    from .text import TextEncoder


class LoraMethods:
    """The part of ``Pipeline`` that changes its adapters. A change replaces ``loaded`` as a whole: calls that run
    meanwhile, in other threads, keep the adapters that they began with."""

    loaded: Components
    _changing: threading.Lock

    def load_lora_weights(self, source: loras.Source, adapter_name: str | None = None, *,
                          weight_name: str | None = None, network_alphas: Mapping[str, float] | None = None) -> None:
        """Loads LoRA matrices and makes them the active adapter.

        source: a file (safetensors; a PyTorch file through the weights-only loader), a folder with one, or a dictionary
        of tensors, in kohya's, diffusers' or peft's layout; they are copied. adapter_name: default_0 and so on if not
        given. weight_name: the file in the folder. network_alphas: alphas by key, for layouts that hold none.
        Raises CheckpointError, naming key and shape, for what is no plain LoRA or was made for another model.
        """
        def change(stack: loras.Stack) -> loras.Stack:
            name = stack.free_name(adapter_name)
            return stack.with_adapter(name, loras.load(source, stack.base, weight_name, network_alphas))

        self._change(change)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Makes these adapters the active ones, on the side path. adapter_weights: a number or dictionary for all, or
        a list with one for each; dictionaries by component, a UNet's by block, as in diffusers. After disable_lora()
        they wait for enable_lora()."""
        self._change(lambda stack: replace(stack, active=stack.choice(adapter_names, adapter_weights)))

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Lets go of adapters, and gives their memory back to the system."""
        self._change(lambda stack: stack.without(adapter_names))
        keep_freed_memory()

    def unload_lora_weights(self) -> None:
        """Lets go of all adapters. What is fused stays in the weights, and unfuse_lora() still takes it out."""
        self._change(loras.Stack.emptied)
        keep_freed_memory()

    def disable_lora(self) -> None:
        """Switches the side path off, keeping its adapters and weights."""
        self._change(lambda stack: replace(stack, enabled=False))

    def enable_lora(self) -> None:
        self._change(lambda stack: replace(stack, enabled=True))

    def fuse_lora(self, components: Sequence[str] | None = None, lora_scale: float = 1.0,
                  adapter_names: Sequence[str] | None = None) -> None:
        """Adds active adapters (all, or those named) to copies of the weights they touch: no cost a step, and memory
        for these copies. components: "unet" or "transformer", "text_encoder", "text_encoder_2"; all if not given."""
        self._change(lambda stack: stack.fuse(components, adapter_names, lora_scale))

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Back to the weights as loaded, bit for bit; the adapters are on the side path again."""
        self._change(lambda stack: stack.unfuse(components))
        keep_freed_memory()

    def get_active_adapters(self) -> list[str]:
        return [] if self.loaded.loras is None else self.loaded.loras.active_names

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> the adapters that have layers in it."""
        found: dict[str, list[str]] = {}
        for name, adapter in ({} if self.loaded.loras is None else self.loaded.loras.adapters).items():
            for component in adapter.parts:
                found.setdefault(component, []).append(name)
        return found

    def _change(self, change: Callable[[loras.Stack], loras.Stack]) -> None:
        with own_modes(), self._changing:
            before = self.loaded
            stack = change(_stack(before))
            self.loaded = _cast(replace(before, loras=stack), stack.chosen)


_SUFFIXES = ("", "_2", "_3")  # of text encoders


def _denoiser(loaded: Components) -> str:
    """What LoRA files and diffusers call it."""
    return "unet" if isinstance(loaded.unet, (UNet2D, UNet2DCondition)) else "transformer"


def _stack(loaded: Components) -> loras.Stack:
    if loaded.loras is not None:
        return loaded.loras
    parts = {_denoiser(loaded): loaded.unet}
    parts |= {f"text_encoder{s}": e.model for s, e in zip(_SUFFIXES, loaded.text_encoders)}
    return loras.Stack.of({name: model for name, model in parts.items() if isinstance(model, Model)})


def _cast(loaded: Components, choice: loras.Choice) -> Components:
    """With the networks for these adapters."""
    assert loaded.loras is not None
    networks = loaded.loras.networks(choice)
    encoders = tuple(replace(e, model=networks[f"text_encoder{s}"]) if f"text_encoder{s}" in networks else e
                     for s, e in zip(_SUFFIXES, loaded.text_encoders))
    return replace(loaded, unet=networks[_denoiser(loaded)], text_encoders=encoders)


@dataclass(frozen=True)
class Cast:
    """Networks, and the pictures of a call that they draw."""

    unet: Any
    text_encoders: tuple[TextEncoder, ...]
    pictures: list[int]


def cast(pipe: Pipeline, request: Request) -> list[Cast]:
    """Pictures with the same adapters share their networks."""
    loaded = pipe.loaded
    groups: dict[loras.Choice, list[int]] = {}
    for picture, choice in enumerate(request.loras):
        groups.setdefault(choice, []).append(picture)
    found = []
    for choice, pictures in groups.items():
        own = loaded if loaded.loras is None or choice == loaded.loras.chosen else _cast(loaded, choice)
        found.append(Cast(own.unet, own.text_encoders, pictures))
    return found


def choices(pipe: Pipeline, given: Any, pictures: int) -> tuple[loras.Choice, ...]:
    """The argument ``loras`` of a call, for each picture. Raises LdmfastError."""
    stack = _stack(pipe.loaded)
    if given is None:
        return (stack.chosen,) * pictures
    each = list(given) if isinstance(given, (list, tuple)) else [given] * pictures
    if len(each) != pictures:
        raise ShapeError(f"loras has {len(each)} entries for {pictures} pictures: give one, or one for each")
    found: dict[int, loras.Choice] = {}
    for one in each:
        if not (one is None or isinstance(one, (str, Mapping))):
            raise LdmfastError(f"loras holds a {type(one).__name__}: give the name of an adapter, {{name: weight}}, or "
                               "a list of these")
        if id(one) not in found:
            weights = {one: None} if isinstance(one, str) else dict(one or {})
            found[id(one)] = stack.choice(list(weights), list(weights.values()))
    return tuple(found[id(one)] for one in each)


def settings_of(pipe: Pipeline, choice: loras.Choice) -> dict[str, Any] | None:
    """What a picture's settings tell of its adapters: by name the fingerprint, and the weight as ``loras`` takes it."""
    stack = pipe.loaded.loras
    if stack is None or not choice:
        return None
    return {name: {"fingerprint": stack.adapters[name].fingerprint, "weight": as_weight(s)} for name, s in choice}


def fused_settings(pipe: Pipeline) -> list[dict[str, Any]] | None:
    """The same of what is fused into the weights."""
    stack = pipe.loaded.loras
    if stack is None or not stack.in_weights:
        return None
    return [{"name": f.name, "fingerprint": f.adapter.fingerprint, "weight": as_weight(((f.component, f.scale),)),
             "lora_scale": f.lora_scale} for f in stack.in_weights]


def active(pipe: Pipeline) -> loras.Choice:
    """The adapters of a call that names none."""
    return _stack(pipe.loaded).chosen


def check_active(pipe: Pipeline, settings: dict[str, Any]) -> None:
    """For calls that name no adapters: raises LdmfastError unless those of the picture are the active ones."""
    now, wanted = {name: as_weight(s) for name, s in active(pipe)}, weights_of(settings)
    if json.loads(json.dumps(now)) != wanted:
        raise LdmfastError(f"the picture was made with the adapters {wanted or 'none'}, active are {now or 'none'}: "
                           "call set_adapters with those names and weights, or disable_lora(), first")


def weights_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The argument ``loras`` from a picture's settings."""
    return {name: one["weight"] for name, one in (settings.get("loras") or {}).items()}


def check_loras(pipe: Pipeline, settings: dict[str, Any]) -> None:
    """Raises LdmfastError unless the adapters that a picture was made with are here."""
    if settings.get("fused_loras") != json.loads(json.dumps(fused_settings(pipe))):
        names = [f["name"] for f in settings.get("fused_loras") or ()]
        raise LdmfastError(f"the picture was made with adapters fused into the weights: {', '.join(names) or 'none'}; "
                           "fuse the same ones, in the same order and with the same weights")
    adapters = {} if pipe.loaded.loras is None else pipe.loaded.loras.adapters
    for row in settings.get("batch") or [settings]:
        for name, one in (row.get("loras") or {}).items():
            if name not in adapters or adapters[name].fingerprint != one["fingerprint"]:
                raise LdmfastError(f"the picture was made with adapter {name!r} (fingerprint {one['fingerprint']}), "
                                   "which is not loaded: load_lora_weights(...) it under this name")
