"""``ldmfast.accelerate``: a diffusers pipeline or model keeps its class, its weights and its switches, and its forward
becomes ours."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from ..errors import LdmfastError, PrecisionError
from ..models import REGISTRY
from .cached import CACHE, checked
from .calls import CALLS
from .solver import put, take_back
from .state import Forward, State
from .threads import share, unshare

T = TypeVar("T")
_STATE = "_ldmfast_state"
_log = logging.getLogger("ldmfast")


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` did. accelerated: component -> class; left_alone: component -> why."""

    precision: str
    accelerated: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = [f"{name} ({kind})" for name, kind in self.accelerated.items()]
        return "; ".join([f"accelerated in {self.precision!r}: {', '.join(done) or 'nothing'}",
                          *(f"{name} left alone: {why}" for name, why in self.left_alone.items())])


def accelerate(obj: T, precision: str = "exact", solver: str | None = None, cache: Any = None) -> T:
    """Makes a diffusers pipeline, or one diffusers model, run on ldmfast's networks; in place, and returns it.

    obj: models of the classes in ``ldmfast.models.REGISTRY`` are accelerated, others are left alone;
    ``obj.ldmfast_report`` says which (and is logged). precision: "exact" (diffusers' result to 1e-4 in fp32; weights
    are shared, nothing is copied), "bf16", "int8" or "fp8" (packed copies beside diffusers' weights, which stay as they
    are; autoencoders take bf16 for 8 bits; results have the dtype of diffusers' weights). solver: also replaces a
    pipeline's scheduler by ``ldmfast.samplers.diffusers_shell``'s: one of ``ldmfast.samplers.SOLVERS``, or diffusers'
    class name. cache: of a pipeline, one of ``ldmfast.caches`` or several, for each of its calls from now on; what it
    left out is in the output's ``report``.

    A call that the native network cannot serve (gradients, LoRA layers, changed attention processors, hooks on
    submodules, FreeU, autocast, ...) runs diffusers' own forward and warns once, naming the reason. The model follows
    its weights: after ``to``, ``half``, ``load_state_dict`` or a change in place the next call uses the new ones.
    Any number of threads may call one pipeline, each with generators of its own: a call that begins while another runs
    is made with a shallow copy of the pipeline, or waits (``ldmfast/accelerated/threads.py``).
    Raises LdmfastError for something else than a pipeline or model, for an unknown solver, and for a cache that does
    not suit the denoiser (nothing is accelerated then), PrecisionError for another precision.
    """
    if precision not in ("exact", "bf16", "int8", "fp8"):
        raise PrecisionError(f"precision {precision!r} is not available here; choose 'exact', 'bf16', 'int8' or 'fp8'")
    report, models = Report(precision), _models(obj)
    if solver is not None:
        put(obj, solver)
    for name, model in models.items():
        why = _why_not(model)
        if why is None:
            _detach(model)
            why = _attach(model, precision)
        if why is None:
            report.accelerated[name] = type(model).__name__
        else:
            report.left_alone[name] = why
    vars(obj).pop(CACHE, None)
    if cache is not None:
        try:
            natives = [vars(models[name])[_STATE].judge(models[name]).native for name in report.accelerated]
            vars(obj)[CACHE] = checked(cache, obj, natives)
        except LdmfastError:
            restore(obj)
            raise
    if not isinstance(obj, nn.Module):
        share(obj)
    obj.ldmfast_report = report  # type: ignore[attr-defined]
    _log.info("%s", report)
    if not report.accelerated:
        warnings.warn(f"ldmfast: {report}", stacklevel=2)
    return obj


def restore(obj: T) -> T:
    """Undoes ``accelerate``: diffusers' own forward again, bit for bit, as weights were never touched. Returns obj."""
    for model in _models(obj).values():
        _detach(model)
    take_back(obj)
    unshare(obj)
    vars(obj).pop("ldmfast_report", None)
    vars(obj).pop(CACHE, None)
    return obj


def _models(obj: Any) -> dict[str, nn.Module]:
    if isinstance(obj, nn.Module):
        return {"model": obj}
    components = getattr(obj, "components", None)
    if not isinstance(components, dict):
        raise LdmfastError(f"a {type(obj).__name__} is neither a diffusers pipeline nor a diffusers model; give one of "
                           "these")
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _why_not(model: nn.Module) -> str | None:
    kind = type(model)
    if kind.__name__ == "OptimizedModule":
        return "it is compiled by torch.compile, which would trace the original; accelerate it before that"
    if kind.__name__ not in REGISTRY or not kind.__module__.startswith("diffusers."):
        return f"there is no native {kind.__module__.partition('.')[0]} {kind.__name__}"
    if model._compiled_call_impl is not None:
        return "it is compiled by torch.compile, which would trace the original; accelerate it instead"
    for part in CALLS[kind.__name__]:
        module = model.get_submodule(part)
        own = vars(module).get(_holder(module))
        if own and not isinstance(own, Forward) and getattr(own, "__func__", None) is not type(module).forward:
            return f"the forward of its {part or kind.__name__} was replaced already; undo that before"
    return None


def _holder(module: nn.Module) -> str:
    """The attribute that the module's own forward is in: hooks of the accelerate library move it."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _attach(model: nn.Module, precision: str) -> str | None:
    """Puts our forward into place, unless there is no native network for this model: then says why."""
    state = State(model, precision)
    verdict = state.judge(model)
    if verdict.native is None:
        return verdict.reason
    for part in CALLS[type(model).__name__]:
        module = model.get_submodule(part)
        vars(module)[_holder(module)] = Forward(state, module, part)
    vars(model)[_STATE] = state
    return None


def _detach(model: nn.Module) -> None:
    state = vars(model).pop(_STATE, None)
    if state is not None:
        state.active = False  # for a forward that somebody's wrapper holds, where it cannot be taken out
    for module in model.modules():
        for name in ("forward", "_old_forward"):
            if isinstance(vars(module).get(name), Forward):
                if name == "forward":
                    del vars(module)[name]
                else:
                    vars(module)[name] = type(module).forward.__get__(module)
