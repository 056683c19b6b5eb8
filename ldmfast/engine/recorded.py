"""CUDA graphs' stand-in on a CPU: the list of operators that a function ran, run again on the same tensors.

It keeps what makes a graph a graph: Python does not run again, every tensor keeps its address, and what a capture
forbids (reading a tensor's value on the host, making one from host numbers) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from .graphs import CaptureError, Replay

_HOST = {  # operators by which a tensor's value comes to the host, or host numbers into a tensor
    "aten::_local_scalar_dense": "reads a tensor's value on the host",
    "aten::item": "reads a tensor's value on the host",
    "aten::is_nonzero": "reads a tensor's value on the host",
    "aten::equal": "reads a tensor's value on the host",
    "aten::nonzero": "has an output whose size depends on values",
    "aten::masked_select": "has an output whose size depends on values",
    "aten::lift_fresh": "copies host numbers into a tensor",
}


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_flatten(values)[0] if isinstance(x, Tensor)]


def _place(x: Tensor) -> int:
    return 0 if x.is_mkldnn else x.untyped_storage().data_ptr()


class _Call:
    """One operator call. ``results``: the tensors that it made, to be filled anew; none for a view or a write."""

    __slots__ = ("arguments", "function", "keywords", "made", "results", "runs")

    def __init__(self, function: Any, arguments: Any, keywords: Any, outputs: Any) -> None:
        self.function, self.arguments, self.keywords = function, arguments, keywords
        given = {_place(x) for x in _tensors((arguments, keywords))} - {0}
        made = _tensors(outputs)
        # by their memory and not by the schema: "reshape" is a view of its input or a copy
        self.results = [_place(x) != 0 and _place(x) not in given for x in made]
        self.runs = function._schema.is_mutable or any(self.results)
        self.made = made

    def again(self) -> None:
        new = _tensors(self.function(*self.arguments, **self.keywords))
        for fresh, kept, target in zip(self.results, self.made, new):
            if fresh:
                kept.copy_(target)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in _HOST:
            raise CaptureError(f"{name} {_HOST[name]}")
        keywords = kwargs or {}
        outputs = func(*args, **keywords)
        call = _Call(func, args, keywords, outputs)
        if call.runs:
            self.calls.append(call)
        return outputs


class RecordedGraphs:
    """Graphs on a CPU, for tests and dry runs: nothing is faster for it. ``captures`` counts them."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.captures = 0

    def order(self) -> AbstractContextManager[object]:
        return nullcontext()

    def capture(self, body: Callable[[], None]) -> Replay:
        body()
        with _Recorder() as recorder:
            body()
        self.captures += 1
        calls: Iterable[_Call] = tuple(recorder.calls)

        def replay() -> None:
            for call in calls:
                call.again()

        return replay

    def drain(self) -> None:
        pass
