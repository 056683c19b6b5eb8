"""A call's cache in recorded stages: what it holds lies in buffers, and the host knows ahead what is where.

Of a policy with a plan (DeepCache, FORA, PAB, T-GATE, MagCache, TaylorSeer, PromptKV) every decision is known before
the first evaluation. Evaluations that decide alike and find the same segments filled are one kind of stage, which is
recorded once; coefficients of a forecast are read from device memory by the number of the stage, like a solver's.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..caches import Action, Session
from ..caches.store import Held, Store, Value, hold, size
from .graphs import CaptureError

Place = tuple[str, Hashable]  # the kind of a segment, and which one
_BLOCK = 64  # places whose coefficients are copied together


def put(buffer: Tensor, values: np.ndarray) -> None:
    """Into the first rows. From pinned memory, so that nothing waits for the device."""
    host = torch.tensor(values)
    host = host.pin_memory() if buffer.is_cuda else host
    buffer[: len(host)].copy_(host, non_blocking=True)


@dataclass
class Did:
    """What one session did in a recorded stage. forecasts, puts: places in the order of the network."""

    forecasts: list[Place] = field(default_factory=list)
    puts: list[tuple[Place, int]] = field(default_factory=list)
    computed: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    forecast: Counter[str] = field(default_factory=Counter)
    skipped: frozenset[str] = frozenset()
    evaluations: int = 0
    single: int = 0

    def count(self, session: Session, step: int, held: int) -> None:
        """Into the call's own session, whose report is asked for. held: bytes of the buffers."""
        for name in ("computed", "reused", "forecast"):
            getattr(session, name).update(getattr(self, name))
        session.skipped[step] |= self.skipped
        session.evaluations += self.evaluations
        session.single_evaluations += self.single
        session.store.peak = held


class Buffers:
    """What replays of one group of pictures read and write; it outlives the calls. stage: int64 (1,), the row of the
    step table. values: by place, and whether guidance has ended, the last values, the newest first."""

    def __init__(self, stage: Tensor, rows: int, most: int) -> None:
        """rows: stages at most. most: values that any policy keeps of a segment."""
        self.stage, self.rows, self.most = stage, rows, most
        self.values: dict[tuple[bool, Place], list[Held]] = {}
        self.ones = torch.ones(1, 2, dtype=torch.float64, device=stage.device)
        self._numbers: dict[Place, int] = {}
        self._blocks: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(size(held) for row in self.values.values() for held in row)

    def weights(self, place: Place) -> Tensor:
        """(rows, 1 + most) float64: 1 for what a residual is added to, then the coefficients of the values."""
        number = self._numbers.setdefault(place, len(self._numbers))
        if number // _BLOCK == len(self._blocks):
            shape = (self.rows, _BLOCK, 1 + self.most)
            self._blocks.append(torch.zeros(shape, dtype=torch.float64, device=self.stage.device))
        return self._blocks[number // _BLOCK][:, number % _BLOCK]

    def load(self, forecasts: Iterable[tuple[Place, int, list[float]]]) -> None:
        """The coefficients of a call: place, stage, numbers."""
        hosts = [np.zeros(tuple(block.shape)) for block in self._blocks]
        for place, step, row in forecasts:
            number = self._numbers[place]
            hosts[number // _BLOCK][step, number % _BLOCK, : 1 + len(row)] = [1.0, *row]
        for block, host in zip(self._blocks, hosts):
            put(block, host)


class Slots(Store):
    """A store whose values lie in Buffers. filled: of which evaluations they are; known on the host, call by call."""

    def __init__(self, buffers: Buffers) -> None:
        super().__init__()
        self.buffers, self.alone = buffers, False
        self.filled: dict[Place, tuple[int, ...]] = {}

    def put(self, kind: str, place: Hashable, step: int, value: Iterable[Tensor | None], most: int, int8: bool) -> None:
        self._write((kind, place), [hold(value, int8)], most)
        self.fill((kind, place), step, most)

    def fill(self, where: Place, step: int, most: int) -> None:
        self.filled[where] = (step, *self.filled.get(where, ()))[:most]

    def steps(self, kind: str, place: Hashable) -> tuple[int, ...]:
        return self.filled.get((kind, place), ())

    def get(self, kind: str, place: Hashable, number: int = 0) -> Value:
        held = self.buffers.values[self.alone, (kind, place)][number]
        return tuple(None if x is None else x.back() for x in held)

    def drop(self, kind: str) -> None:
        self.filled = {where: steps for where, steps in self.filled.items() if where[0] != kind}

    def map(self, function: Callable[[str, Tensor], Tensor]) -> None:
        new = {}
        for where, steps in self.filled.items():
            row = self.buffers.values[self.alone, where]
            new[where] = len(row), [tuple(None if x is None else x.map(partial(function, where[0])) for x in held)
                                    for held in row[: len(steps)]]
        self.alone = True  # the values have other rows from here on, and so other buffers
        for where, (most, values) in new.items():
            self._write(where, values, most)

    def _write(self, where: Place, values: list[Held], most: int) -> None:
        """values in front of those that are there, or in their place."""
        row = self.buffers.values.get((self.alone, where))
        if row is None:  # when it runs before the capture
            row = self.buffers.values[self.alone, where] = [_like(values[0]) for _ in range(most)]
        for i in reversed(range(len(values), len(row))):
            _copy(row[i], row[i - len(values)])
        for buffer, value in zip(row, values):
            _copy(buffer, value)


def _like(held: Held) -> Held:
    found: list[Any] = [copy.copy(x) for x in held]
    for x in found:
        for name, tensor in _tensors(x):
            setattr(x, name, torch.zeros_like(tensor))
    return tuple(found)


def _copy(into: Held, held: Held) -> None:
    if [_shapes(x) for x in into] != [_shapes(x) for x in held]:
        raise CaptureError("what the cache holds of a segment changes its shape between evaluations")
    for buffer, value in zip(into, held):
        for name, tensor in _tensors(buffer):
            tensor.copy_(getattr(value, name))


def _shapes(x: Any) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, t.shape, t.dtype) for name, t in _tensors(x)]


def _tensors(x: Any) -> list[tuple[str, Tensor]]:
    return [] if x is None else [(name, t) for name, t in vars(x).items() if isinstance(t, Tensor)]


class RecordedSession(Session):
    """The decisions of a call's own session, walked through on the host before the first replay: kind() and follow()
    for every stage in turn; where a kind is new, begin() before each run of its stage and end() after the last."""

    store: Slots

    def __init__(self, given: Session, buffers: Buffers, branches: int) -> None:
        vars(self).update(vars(given))
        self.buffers, self.branches, self.store = buffers, branches, Slots(buffers)
        self.forecasts: list[tuple[Place, int, list[float]]] = []
        self._numbers: dict[tuple[str, tuple[int, ...], int], list[float]] = {}
        self._before: tuple[dict[Place, tuple[int, ...]], bool] = ({}, False)
        self._did = Did()

    def kind(self, step: int) -> Hashable:
        """What the recording of an evaluation depends on: its decisions, and what it finds and combines."""
        found = []
        single = self.branches > 1 and self.single(step)
        for kind, plan in sorted(self._plan.items()):
            computed = plan[step] is Action.COMPUTE  # of one branch, it is kept beside what is there
            places = frozenset((where, 0 if computed else self._terms(kind, steps, step))
                               for where, steps in self.store.filled.items()
                               if where[0] == kind and (single or not computed))
            found.append((kind, plan[step], plan[step] is not Action.COMPUTE or self._kept[kind][step], places))
        ends = single and self.ended(step) and not self._merged  # guidance does; all that is held is made anew
        halved = frozenset((where, len(steps)) for where, steps in self.store.filled.items() if ends)
        return single, halved, tuple(found)

    def _terms(self, kind: str, steps: tuple[int, ...], step: int) -> int:
        """How many values are combined, 0 where the newest stands for itself."""
        row = self._row(kind, steps, step)
        return 0 if row == [1.0] else len(row)

    def _row(self, kind: str, steps: tuple[int, ...], step: int) -> list[float]:
        key = (kind, steps, step)
        if key not in self._numbers:
            reuse = self._plan[kind][step] is Action.REUSE
            self._numbers[key] = [1.0] if reuse else self._policy[kind].weights(steps, step)
        return self._numbers[key]

    def begin(self, step: int) -> None:
        """Before each run of a stage that is being recorded, which are several."""
        self.store.filled, self._merged = dict(self._before[0]), self._before[1]
        self.store.alone, self.step, self._did = self._merged, step, Did()
        self.computed, self.reused, self.forecast = self._did.computed, self._did.reused, self._did.forecast
        self.skipped = [set() for _ in self.call.times]
        self.evaluations = self.single_evaluations = 0

    def end(self) -> Did:
        """What this session did in the run of a stage since begin(). The host is back where it was before."""
        did = self._did
        did.skipped = frozenset(self.skipped[self.step])
        did.evaluations, did.single = self.evaluations, self.single_evaluations
        self.store.filled, self._merged = dict(self._before[0]), self._before[1]
        self.store.alone = self._merged
        return did

    def follow(self, step: int, did: Did) -> None:
        """On the host alone: what a stage that did this leaves behind, and the coefficients that it reads."""
        self.forecasts += [(w, step, self._row(w[0], self.store.filled[w], step)) for w in did.forecasts]
        self._merged = self._merged or (self.branches > 1 and self.ended(step))
        for where, most in did.puts:
            self.store.fill(where, step, most)
        for kind, last in self._last.items():
            if step >= last:
                self.store.drop(kind)
        self._before = dict(self.store.filled), self._merged

    # ---- what the base does otherwise

    def _keep(self, kind: str, place: Hashable, value: tuple[Tensor | None, ...], indicator: Tensor | None = None,
              told: Tensor | None = None) -> None:
        super()._keep(kind, place, value, indicator, told)
        if self._wants(kind):
            self._did.puts.append(((kind, place), self._policy[kind].held))

    def _combine(self, where: Place, steps: tuple[int, ...], weights: list[float], base: Tensor | None,
                 parts: Any) -> Tensor:
        inputs = [*parts] if base is None else [base, *parts]
        if weights == [1.0]:
            return ops.lincomb(self.buffers.ones, 0, inputs)
        if where not in self._did.forecasts:  # text and image of one segment share their coefficients
            self._did.forecasts.append(where)
        row = self.buffers.weights(where)[:, int(base is None): 1 + len(weights)]
        return ops.lincomb(row, self.buffers.stage, inputs)
