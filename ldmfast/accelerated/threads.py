"""One diffusers pipeline, called by many threads.

A call of diffusers' writes into its pipeline (``_guidance_scale``, ``_interrupt``, ...), its scheduler and its
tokenizers. The call that finds an accelerated pipeline free runs on the pipeline itself, so that nothing is different
for one thread. A call that begins meanwhile runs on a shallow copy with a scheduler of its own, and its callbacks are
given that copy; or it waits, where calls may change what copies share: offloaded models, LoRA layers, a VAE that is
upcast for decoding, pipelines other than those named here.

Python looks ``__call__`` up in the class, so it is wrapped there for as long as a pipeline of the class is accelerated;
others of the class pass through, and the class stays diffusers'.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .cached import reported, running

_MARK = "_ldmfast_shared"
# a call of these changes its pipeline, its scheduler, its tokenizers (in encode_prompt), and nothing else
_SIDE_BY_SIDE = frozenset({
    *(f"StableDiffusion{kind}{task}Pipeline" for kind in ("", "XL", "3", "ControlNet", "XLControlNet")
      for task in ("", "Img2Img", "Inpaint")),
    "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline",
    "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", "DiTPipeline",
})
_CHANGES_MODELS = ("_hf_hook", "_diffusers_hook", "peft_config")  # offloading, caches, LoRA layers

_gate = threading.Condition(threading.RLock())
# id of a pipeline or scheduler that a call runs on -> (it, the call's thread, the scheduler as it was before)
_used: dict[int, tuple[Any, int, Any]] = {}
_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # -> lock
_marks: dict[tuple[type, str], weakref.WeakSet[Mark]] = {}  # method that is wrapped -> what asks for it


class Mark:
    """In the attributes of a pipeline: its calls may share it. Copies and pickles with the pipeline."""

    def __init__(self, kind: type):
        self.kind = kind
        with _gate:
            for owner, name in _places(kind):
                theirs = vars(owner)[name]
                if not _is_ours(theirs):
                    setattr(owner, name, _WRAPPERS[name](theirs))
                _marks.setdefault((owner, name), weakref.WeakSet()).add(self)

    def __reduce__(self) -> tuple[type, tuple[type]]:
        return Mark, (self.kind,)

    def remove(self) -> None:
        with _gate:
            for owner, name in _places(self.kind):
                left, ours = _marks[owner, name], vars(owner)[name]
                left.discard(self)
                if not left and _is_ours(ours):  # else somebody wrapped it since; without marks ours does nothing
                    setattr(owner, name, ours.__wrapped__)


def share(pipe: Any) -> None:
    """From now on threads may call the pipeline at once, each as if it were alone."""
    vars(pipe).setdefault(_MARK, Mark(type(pipe)))


def unshare(pipe: Any) -> None:
    mark = vars(pipe).pop(_MARK, None)
    if mark is not None:
        mark.remove()


def _is_ours(method: Any) -> bool:
    return getattr(method, _MARK, None) is method  # functools.wraps copies the mark to whoever wraps ours


def _places(kind: type) -> list[tuple[type, str]]:
    """The classes that define the two methods of a pipeline."""
    found = ((next((c for c in kind.__mro__ if name in vars(c)), object), name) for name in _WRAPPERS)
    return [(owner, name) for owner, name in found if owner is not object]


def _call(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _MARK not in vars(self):
            return theirs(self, *args, **kwargs)
        with _turn(self) as pipe, running(pipe) as run:
            return reported(run, theirs(pipe, *args, **kwargs))

    setattr(__call__, _MARK, __call__)
    return __call__


def _encode_prompt(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _MARK not in vars(self):
            return theirs(self, *args, **kwargs)
        with ExitStack() as held:
            for lock in _tokenizer_locks(self):
                held.enter_context(lock)
            return theirs(self, *args, **kwargs)

    setattr(encode_prompt, _MARK, encode_prompt)
    return encode_prompt


_WRAPPERS = {"__call__": _call, "encode_prompt": _encode_prompt}


@contextmanager
def _turn(pipe: Any) -> Iterator[Any]:
    """The pipeline, or a copy of it, for one call."""
    with _gate:
        place = _place(pipe)
        while place is None:
            _gate.wait()
            place = _place(pipe)
        chosen, taken = place
        _used.update(taken)
    try:
        yield chosen
    finally:
        with _gate:
            for i in taken:
                del _used[i]
            _gate.notify_all()


def _place(pipe: Any) -> tuple[Any, dict[int, tuple[Any, int, Any]]] | None:
    """(what to run on, what that occupies), or None: not now. What a thread has already, its inner calls share."""
    me, schedulers = threading.get_ident(), _schedulers(pipe)
    own = [pipe, *schedulers.values()]
    if all(_used.get(id(x), (x, me))[1] == me for x in own):
        return pipe, {id(x): (x, me, None if x is pipe else _copy(x)) for x in own if id(x) not in _used}
    if not _side_by_side(pipe):
        return None
    twin = object.__new__(type(pipe))
    vars(twin).update(vars(pipe))
    for name, scheduler in schedulers.items():
        vars(twin)[name] = _copy(_used[id(scheduler)][2] if id(scheduler) in _used else scheduler)
    return (twin, {}) if all(vars(twin)[name] is not None for name in schedulers) else None


def _schedulers(pipe: Any) -> dict[str, Any]:
    return {name: part for name, part in list(vars(pipe).items()) if hasattr(type(part), "set_timesteps")}


def _copy(scheduler: Any) -> Any:
    try:
        return copy.deepcopy(scheduler)
    except Exception:  # whatever a scheduler holds that cannot be copied: then calls wait for each other
        return None


def _side_by_side(pipe: Any) -> bool:
    kind, vae = type(pipe), getattr(pipe, "vae", None)
    if kind.__name__ not in _SIDE_BY_SIDE or not kind.__module__.startswith("diffusers."):
        return False
    if getattr(vae, "dtype", None) == torch.float16 and getattr(vae.config, "force_upcast", False):  # type: ignore[union-attr]
        return False
    models = [part for part in list(vars(pipe).values()) if isinstance(part, nn.Module)]
    return not any(name in vars(m) for model in models for m in model.modules() for name in _CHANGES_MODELS)


def _tokenizer_locks(pipe: Any) -> list[Any]:
    """Of its tokenizers, in an order that is the same for all pipelines."""
    parts = [part for name, part in list(vars(pipe).items()) if name.startswith("tokenizer") and callable(part)]
    with _gate:
        return sorted((_tokenizers.setdefault(part, threading.RLock()) for part in parts), key=id)
