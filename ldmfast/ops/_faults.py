"""What was wrong with a call that failed: the errors of Python, torch and the dispatcher about an argument's kind, in
one line of ours. Looked for after the failure, so that good calls pay for a frame and no more."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import DeviceError, LdmfastError

NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODES = ("zero_point", "weight_sums", "row", "state")  # arguments that are integers
CODES_OF_Q8 = ("q", "x", "weight")  # those that may be, of rows <op>_q8
ANY_DTYPE = ("kv_append", "kv_gather", "pack_weight")
Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])


def tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among named arguments, those of a list as name[i]."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, (list, tuple)):
            found.update(tensors({f"{name}[{i}]": part for i, part in enumerate(value)}))
    return found


def elsewhere(op: str, arguments: Mapping[str, Any]) -> DeviceError | None:
    """The error about two tensors on two devices."""
    named = list(tensors(arguments).items())
    for name, x in named[1:]:
        if x.device != named[0][1].device:
            return DeviceError(f"{op}: {named[0][0]} is on {named[0][1].device} and {name} on {x.device}; bring both "
                               "to one device")
    return None


def on_one_device(op: str, fake: Callable[..., Result]) -> Callable[..., Result]:
    """A fake that refuses tensors of two devices. Of a CPU and a meta tensor the dispatcher serves the second, and the
    result would be memory of the CPU that nobody has written."""
    names = tuple(inspect.signature(fake).parameters)

    @functools.wraps(fake)
    def checked(*args: Any) -> Result:
        if (error := elsewhere(op, dict(zip(names, args)))) is not None:
            raise error
        return fake(*args)

    return checked


def _of_kind(value: Any, kinds: str) -> bool:
    for kind in kinds.split(" | "):
        if (kind == "None" and value is None) or (kind == "Tensor" and isinstance(value, Tensor)):
            return True
        if kind in ("int", "bool") and hasattr(value, "__index__") and not isinstance(value, Tensor):
            return not isinstance(value, int) or -2**63 <= value < 2**63
        if kind == "float" and (hasattr(value, "__float__") or hasattr(value, "__index__")):
            return True
        if kind == "Sequence[Tensor]" and isinstance(value, (list, tuple)):
            return all(isinstance(x, Tensor) for x in value)
    return False


def _wrong(op: str, kinds: Mapping[str, str], arguments: Mapping[str, Any]) -> LdmfastError | None:
    for name, value in arguments.items():
        if not _of_kind(value, kinds[name]):
            shown = repr(value) if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__
            return LdmfastError(f"{op}: {name} is {shown[:60]}, needs {kinds[name]}")
    if (moved := elsewhere(op, arguments)) is not None:
        return moved
    for name, x in tensors(arguments).items():
        if x.layout != torch.strided:
            return LdmfastError(f"{op}: {name} has layout {x.layout}, needs a dense tensor: name.to_dense()")
        codes = name in CODES or (op.endswith("_q8") and name in CODES_OF_Q8)
        if x.dtype not in NUMBERS and not codes and op not in ANY_DTYPE:
            return LdmfastError(f"{op}: {name} is {x.dtype}, needs float32, bfloat16, float16 or float64")
    return None


def public(function: Function) -> Function:
    """The public function of a row: what it raises is an LdmfastError if an argument is the cause."""
    kinds = {name: str(p.annotation) for name, p in inspect.signature(function).parameters.items()}

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        try:
            return function(*args, **named)
        except (AttributeError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            try:
                given = inspect.signature(function).bind(*args, **named).arguments
            except TypeError:  # an argument too many or too few: Python has said so
                raise error from None
            if (wrong := _wrong(function.__name__, kinds, given)) is None:
                raise
            raise wrong from error

    return call  # type: ignore[return-value]
