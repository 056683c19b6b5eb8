"""Which recorded work is kept, which call gets it, and when a call runs eagerly instead."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import LdmfastError
from ..models.transformer_blocks import TransformerState
from ..samplers.sample import Generators, StepCallback, noise_source
from ..samplers.step_table import StepTable
from .graphs import CaptureError, Graphs
from .loop import Loop, key
from .sides import identity, own
from .watch import Watch

if TYPE_CHECKING:
    from ..pipelines.denoiser import Denoiser


class Function:
    """A recorded function of one tensor, with fixed input and output."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, graphs: Graphs) -> None:
        self.function, self.input, self.output = function, x.clone(), torch.empty(0)
        self.replay = graphs.capture(self._body)

    def _body(self) -> None:
        y = self.function(self.input)
        if self.output.shape != y.shape:  # only when it runs before the capture
            self.output = torch.empty_like(y)
        self.output.copy_(y)

    def __call__(self, x: Tensor) -> Tensor:
        self.input.copy_(x)
        self.replay()
        return self.output.clone()


@dataclass
class _Entry:
    """who: sides.identity of the module. work: what was recorded, or why it could not be."""

    module: nn.Module
    who: Hashable
    work: Loop | Function | str


class Engine:
    """Recorded loops and decoders of one pipeline, the least recently used of more than ``limit`` let go; a loop keeps
    a graph for each kind of its stages, which differ where a cache or the interval of a guidance says so.

    A call takes the engine for itself from its first stage to its last, because the buffers are the engine's; calls of
    several threads come one after another. What cannot be recorded runs eagerly: the methods return None, having
    changed and drawn nothing, and a RuntimeWarning names the reason, once.
    """

    def __init__(self, graphs: Graphs, limit: int = 8) -> None:
        self.graphs, self.limit = graphs, limit
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._watches: dict[int, Watch] = {}
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._told: set[str] = set()

    def __len__(self) -> int:
        """Graphs kept: a decoder is one, a loop has one for each kind of its stages."""
        works = [e.work for e in self._entries.values()]
        return sum(len(w.kinds) if isinstance(w, Loop) else 1 for w in works if not isinstance(w, str))

    def sample(self, denoiser: Denoiser, x: Tensor, *, table: StepTable, generator: Generators = None,
               callback: StepCallback | None = None, before_stage: Callable[[], None] | None = None) -> Tensor | None:
        """``samplers.sample`` of that denoiser, or None where it must run eagerly. before_stage may raise StopSampling.
        The callback gets a copy of x, and what it writes there counts if it returns it."""
        reason = _refusal(denoiser, table)
        if reason:
            self.tell(reason)
            return None
        draw = noise_source(generator, x)
        return self._run(denoiser.unet, ("loop", key(denoiser, x, table)),
                         lambda unet: Loop(denoiser, unet, x, table, self.graphs),
                         lambda loop: loop.run(denoiser, table, draw, callback, before_stage),
                         lambda loop: loop.prepare(denoiser, x, table))

    def call(self, module: nn.Module, name: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        """function(x), which is a method of ``module`` and depends on nothing but x and ``name``; or None."""
        return self._run(module, (name, tuple(x.shape), x.dtype), lambda _: Function(function, x, self.graphs),
                         lambda work: work(x))

    def _run(self, module: nn.Module, key: Hashable, record: Callable[[nn.Module], Any],
             run: Callable[[Any], Tensor], prepare: Callable[[Any], None] | None = None) -> Tensor | None:
        """prepare: of a call, before anything of it runs; it may record more."""
        with self._alone() as free:
            if not free:
                self.tell("a callback called the pipeline while its own call was running")
                return None
            with torch.inference_mode(), self.graphs.order():
                work = self._work(module, key, record, prepare)
                if isinstance(work, str):
                    self.tell(work)
                    return None
                out = run(work)
        if out.is_cuda:  # allocated in the engine's order, used and let go in the caller's
            out.record_stream(torch.cuda.current_stream(out.device))
        return out

    def clear(self) -> None:
        """Lets every graph go, and its memory. Raises LdmfastError in a callback of a call that uses one."""
        with self._alone() as free:
            if not free:
                raise LdmfastError("engine.clear(): a call of this thread is using its graph; clear it after the call")
            self._forget(list(self._entries))
            self._watches.clear()

    def _work(self, module: nn.Module, key: Hashable, record: Callable[[nn.Module], Any],
              prepare: Callable[[Any], None] | None) -> Loop | Function | str:
        who = identity(module)
        key, module = (key, who), self._owned(module, who)
        watch = self._watches.get(id(module))
        if watch is not None and watch.moved():
            self._forget([k for k, e in self._entries.items() if e.module is module])
            watch = None
        if watch is None:
            watch = self._watches[id(module)] = Watch(module)
        if watch.hooked():
            return "forward hooks are registered, which a replay would not call"
        if key not in self._entries:
            self._forget(list(self._entries)[: max(0, len(self._entries) + 1 - self.limit)])
            self._entries[key] = _Entry(module, who, self._record(partial(record, module)))
            used = {id(e.module) for e in self._entries.values()}  # a watch holds its module, with all its weights
            self._watches = {i: w for i, w in self._watches.items() if i in used}
        work = self._entries[key].work
        if prepare is not None and not isinstance(work, str):
            failed = self._record(partial(prepare, work))
            if failed is not None:
                self._forget([k for k in self._entries if k == key])
                self._entries[key] = _Entry(module, who, failed)
        self._entries.move_to_end(key)
        return self._entries[key].work

    def _owned(self, module: nn.Module, who: Hashable) -> nn.Module:
        """The network that is recorded for this one: itself, or with adapters the one whose buffers they go into."""
        if who == id(module):
            return module
        kept = next((e.module for e in self._entries.values() if e.who == who), None)
        return kept or own(module)

    def _record(self, record: Callable[[], Any]) -> Any:
        try:
            return record()
        except CaptureError as error:
            return f"it cannot be captured ({error})"
        except torch.OutOfMemoryError:
            self._forget(list(self._entries))
            return "the memory does not hold its graph"

    def _forget(self, keys: list[Hashable]) -> None:
        if keys:
            self.graphs.drain()
        for k in keys:
            del self._entries[k]

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Waits for other threads' calls. False in a thread whose own call is running."""
        me = threading.get_ident()
        if self._owner == me:
            yield False
            return
        with self._lock:
            self._owner = me
            try:
                yield True
            finally:
                self._owner = None

    def tell(self, reason: str) -> None:
        """Warns, once, that a call runs eagerly."""
        if reason not in self._told:
            self._told.add(reason)
            warnings.warn(f"ldmfast: runs eagerly, without CUDA graphs: {reason}", RuntimeWarning, stacklevel=2)


def _refusal(denoiser: Denoiser, table: StepTable) -> str:
    states = [s for some in denoiser.forwards for forward in some for s in forward.states]
    sessions = [s for s in denoiser.sessions if s is not None]
    if any(isinstance(s, TransformerState) and s.rows is None for s in states):
        return "the modulations of all steps would not fit into their share of the memory"
    if denoiser.plan.unsteady:
        return denoiser.plan.unsteady
    if any(len(some) != 1 for some in denoiser.forwards):
        return "its guidance needs no forward, or several, at some of the steps"
    if any(s.deciding() for s in sessions):
        return f"the cache {sessions[0].deciding()} decides at every step by a number that is read on the host"
    if sessions and len({some[0] for some in denoiser.forwards}) > 1:
        return "the call has a cache, and guidance that does not do the same at every step"
    if table.clip is not None:
        return f"{table.solver} clips the predicted picture, which is not linear"
    if table.adapts:
        return f"the coefficients of {table.solver} follow from the pictures"
    if denoiser.casts > 1:
        return "the pictures of the batch have different adapters"
    if denoiser.unet.plan is not None:
        return "the network changes with the timestep (int8 plan of several ranges)"
    return ""
