"""The forward that is put into a diffusers model, and what it knows: the native network, and whether it still fits."""

from __future__ import annotations

import inspect
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import LdmfastError
from ..models import Model, from_diffusers
from .cached import within_run
from .calls import CALLS
from .inspection import Blueprint
from .watch import Structure, Weights

_MOST_WARNINGS = 100  # of one model: reasons may hold shapes, of which there is no end


@dataclass(frozen=True)
class Verdict:
    """What was found out about a model in one state. native is None where ``reason`` says why diffusers must run."""

    structure: Structure
    weights: Weights
    native: Model | None = None
    reason: str | None = None

    def stands(self, model: nn.Module) -> bool:
        return self.structure.holds(model) and self.weights.hold()


class State:
    """Shared by the replaced forwards of one model. Safe with threads: what a call reads is replaced as a whole."""

    def __init__(self, model: nn.Module, precision: str):
        self.model = weakref.ref(model)
        self.precision = precision
        self.active = True
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._blueprint: Blueprint | None = None
        self._verdict: Verdict | None = None
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model(), "precision": self.precision, "active": self.active}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        """Of a copy or a pickle: the native network is made again, of the new model's weights, at the first call."""
        self.model, self.precision, self.active = weakref.ref(kept["model"]), kept["precision"], kept["active"]
        self._reset()

    def judge(self, model: Any) -> Verdict:
        """The native network for the model as it is now, or why there is none."""
        verdict = self._verdict
        if verdict is None or not verdict.stands(model):
            with self._lock:
                verdict = self._verdict
                if verdict is None or not verdict.stands(model):
                    verdict = self._verdict = self._look(model, verdict)
        return verdict

    def _look(self, model: Any, before: Verdict | None) -> Verdict:
        structure, name = Structure(model), type(model).__name__
        # bf16 for autoencoders, as in our own pipelines: 8 bits in a decoder are seen
        precision = "bf16" if self.precision in ("int8", "fp8") and "decoder" in CALLS[name] else self.precision
        if self._blueprint is None or self._blueprint.config is not model.config:
            self._blueprint = Blueprint(model)
        reason = self._blueprint.difference(model, whole="" in CALLS[name])
        if reason is not None:
            return Verdict(structure, Weights(model, copied=False), reason=reason)
        if (before is not None and before.native is not None and before.weights.are_of(model)
                and before.weights.hold()):
            return Verdict(structure, before.weights, before.native)
        with torch.inference_mode(False), torch.no_grad():
            weights = Weights(model, copied=precision != "exact")
            try:
                return Verdict(structure, weights, from_diffusers(model, precision=precision))
            except LdmfastError as error:
                return Verdict(structure, weights, reason=str(error))

    def warn(self, model: nn.Module, reason: str) -> None:
        if reason not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(reason)
            warnings.warn(f"ldmfast: {type(model).__name__} runs diffusers' own forward, because {reason}",
                          stacklevel=2)


class Forward:
    """Stands in a module as ``forward``. Copies and pickles with it; its signature is the one of diffusers."""

    __name__ = "forward"

    def __init__(self, state: State, module: nn.Module, part: str):
        self.state, self.module, self.part = state, weakref.ref(module), part

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state, "module": self.module(), "part": self.part}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.state, self.module, self.part = kept["state"], weakref.ref(kept["module"]), kept["part"]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._theirs())

    @property
    def __code__(self) -> types.CodeType:
        """torch.export reads the arguments' names from it."""
        return self._theirs().__code__

    def _theirs(self) -> Callable[..., Any]:
        """diffusers' own forward, bound."""
        module = self.module()
        if module is None:
            raise LdmfastError("the model of this forward does not exist any more; keep a reference to it")
        return type(module).forward.__get__(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        theirs, model = self._theirs(), self.state.model()
        # a part may outlive its autoencoder, and a wrapper keep us after restore
        if model is None or not self.state.active:
            return theirs(*args, **kwargs)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            _say_that_traced()
            return theirs(*args, **kwargs)
        given = inspect.signature(theirs).bind(*args, **kwargs).arguments
        reason = _unfit(model, given)
        if reason is None:
            verdict = self.state.judge(model)
            reason = verdict.reason
        if reason is None:
            try:
                return CALLS[type(model).__name__][self.part](within_run(verdict.native), dict(given))
            except LdmfastError as error:  # diffusers may know what to do, or raises an error of its own
                reason = str(error)
        out = theirs(*args, **kwargs)
        self.state.warn(model, reason)
        return out


@torch.compiler.assume_constant_result  # runs while tracing, and leaves no break in the graph
def _say_that_traced() -> bool:
    warnings.warn("ldmfast: an accelerated model is compiled or traced, so diffusers' own forward goes into the graph; "
                  "call it without torch.compile to run ours", stacklevel=2)
    return True


def _unfit(model: Any, given: dict[str, Any]) -> str | None:
    """Why this call is not for the native network, as far as its arguments and torch's modes tell."""
    sample, weight = next(iter(given.values())), next(model.parameters())
    tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    strange = next((t for t in tensors if type(t) not in (Tensor, nn.Parameter)), None)
    if not isinstance(sample, Tensor) or strange is not None:
        return f"an argument is a {type(sample if strange is None else strange).__name__}"
    if (sample.dtype, sample.device) != (weight.dtype, weight.device):
        return f"the sample is {sample.dtype} on {sample.device}, the weights are {weight.dtype} on {weight.device}"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if torch.is_grad_enabled() and (any(p.requires_grad for p in model.parameters())
                                    or any(t.requires_grad for t in tensors)):
        return "gradients are asked for (call it under torch.no_grad())"
    return "torch.autocast is active" if torch.is_autocast_enabled(sample.device.type) else None
