"""The sampling loop in fixed buffers: recorded stages, replayed for every stage of any step table."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..guidance import Branch
from ..models.transformer_blocks import PatchEmbed
from ..samplers.sample import NoiseFunction, StepCallback, StopSampling
from ..samplers.step_table import StepTable
from .cached import Buffers, Did, RecordedSession, put
from .graphs import Graphs, Replay
from .sides import Sides
from .state import State, fill, room, shape_of, with_cache

if TYPE_CHECKING:
    from ..pipelines.denoiser import Denoiser
    from ..pipelines.guided import Forward

_LEAST_STAGES = 64  # 64 rows of times for SDXL are 10 MB; longer tables take the next power of two
_MOST_KINDS = 16  # of stages are kept for one key, and all of the last call's


def capacity(table: StepTable) -> int:
    """Rows of the buffers that hold this table."""
    return max(_LEAST_STAGES, 1 << (table.num_stages - 1).bit_length())


def _forwards(denoiser: Denoiser) -> list[Forward]:
    """Those that the evaluations of a steady plan have, one each, in an order that does not depend on their times."""
    found = list(dict.fromkeys(some[0] for some in denoiser.forwards))
    return sorted(found, key=lambda f: [denoiser.plan.branches.index(b) for b in f.branches])


def key(denoiser: Denoiser, x: Tensor, table: StepTable) -> Hashable:
    """What recorded stages depend on. Not in it, because it is read from buffers: coefficients, times, prompts,
    noise, the guidance scale (but where guidance is rescaled, which is not linear), and when a cache computes what."""
    plan = denoiser.plan
    states = tuple((tuple(plan.branches.index(b) for b in f.branches), *(shape_of(s) for s in f.states),
                    *(None if s is None else shape_of(s) for s in f.alone)) for f in _forwards(denoiser))
    rescaled = None if plan.linear else (plan.rescale, tuple(map(float, plan.weights[0])))
    extra = None if denoiser.extra is None else denoiser.extra.shape
    sessions = tuple(None if s is None else s.holds() for s in denoiser.sessions)
    return (tuple(x.shape), x.dtype, denoiser.dtype, states, sessions, extra, rescaled, table.columns,
            bool((table.c_in == 1).all()), capacity(table), getattr(denoiser.unet, "fp8_attention", False))


@dataclass
class _Part:
    """Branches that one forward evaluates together, and the buffers of their conditions, by groups of pictures. alone:
    of the last branch, where a cache may run it by itself."""

    branches: tuple[Branch, ...]
    states: list[State]
    alone: list[State | None]


@dataclass(frozen=True)
class _Kind:
    """A recorded kind of stage, and what the caches did in it."""

    replay: Replay
    did: tuple[Did, ...]


class Loop:
    """Buffers of one key, and the recorded stages that read and write them: one for each kind of stage, which differ
    where guidance has an interval or a cache leaves something out.

    x, noise, registers: (pictures, C, h, w) fp32. stage: int64 (1,), the row of the table that comes next; a recorded
    stage counts it up itself. matrices: (capacity, 1 + registers, columns) and c_in: (capacity, 1), float64.
    """

    def __init__(self, denoiser: Denoiser, unet: nn.Module, x: Tensor, table: StepTable, graphs: Graphs) -> None:
        """unet: the denoiser's, or its like with adapters in buffers (``sides.own``)."""
        rows, device = capacity(table), x.device
        self.graphs, self.denoiser = graphs, copy.copy(denoiser)
        self.extra = None if denoiser.extra is None else torch.empty_like(denoiser.extra)
        self.parts = [_Part(f.branches, [room(s, rows) for s in f.states],
                            [None if s is None else room(s, rows) for s in f.alone]) for f in _forwards(denoiser)]
        # the call's own are not kept
        vars(self.denoiser).update(extra=None, unet=unet, unets=[], pipe=None, request=None,
                                   forwards=[], sessions=[], seen=[], memory={})
        self.unet, self.sides = unet, Sides(unet)
        embed = getattr(unet, "pos_embed", None)
        self.positions = embed.positions(x) if isinstance(embed, PatchEmbed) else None  # nobody else keeps them
        self.x, self.noise = torch.empty_like(x), torch.zeros_like(x)
        self.registers = [torch.zeros_like(x) for _ in range(table.num_registers)]
        self.stage = torch.zeros(1, dtype=torch.int64, device=device)
        self.time_rows = torch.zeros(rows, dtype=torch.int64, device=device)
        columns = len(table.columns)
        self.matrices = torch.zeros(rows, 1 + table.num_registers, columns, dtype=torch.float64, device=device)
        self.scaled = not (table.c_in == 1).all()
        self.c_in = torch.ones(rows, 1, dtype=torch.float64, device=device)
        self.held = [None if s is None else Buffers(self.stage, rows, max(p.held for p in s.policies))
                     for s in denoiser.sessions]
        self.kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self.order: list[_Kind] = []

    def prepare(self, denoiser: Denoiser, x: Tensor, table: StepTable) -> None:
        """Makes ready for a call's run. Its kinds of stages that no call has had before are recorded. Raises
        CaptureError."""
        self._load(denoiser, x, table)
        forwards, known = _forwards(denoiser), set(self.kinds)
        sessions = [RecordedSession(s, b, len(denoiser.plan.branches)) for s, b in zip(denoiser.sessions, self.held)
                    if s is not None and b is not None]
        self.order = []
        for step, (forward,) in enumerate(denoiser.forwards):
            number = forwards.index(forward)
            name = number, *(s.kind(step) for s in sessions)
            if name not in self.kinds:
                self.kinds[name] = self._record(self.parts[number], sessions, step)
            self.kinds.move_to_end(name)
            self.order.append(self.kinds[name])
            for session, did in zip(sessions, self.kinds[name].did):
                session.follow(step, did)
        self._let_go(len(set(map(id, self.order))))
        if set(self.kinds) - known:  # recording has run stages
            self._load(denoiser, x, table)
        for session in sessions:
            session.buffers.load(session.forecasts)

    def _record(self, part: _Part, sessions: list[RecordedSession], step: int) -> _Kind:
        self.stage.zero_()  # whatever ran before: a recording runs twice
        replay = self.graphs.capture(partial(self._stage, part, sessions, step))
        return _Kind(replay, tuple(session.end() for session in sessions))

    def _let_go(self, used: int) -> None:
        """The least recently used kinds that are too many, but none of the last call's."""
        spare = max(0, len(self.kinds) - max(_MOST_KINDS, used))
        if spare:
            self.graphs.drain()
        for _ in range(spare):
            self.kinds.popitem(last=False)

    def _load(self, denoiser: Denoiser, x: Tensor, table: StepTable) -> None:
        """Puts a call's start, conditions and coefficients into the buffers; the next stage is the first."""
        self.sides.load(denoiser.unet)
        self.x.copy_(x)
        self.stage.zero_()
        for register in self.registers:
            register.zero_()
        put(self.matrices, table.matrices)
        put(self.c_in, table.c_in[:, None])
        rows = [denoiser.row(t, stage) for stage, t in enumerate(table.network_times.tolist())]
        put(self.time_rows, np.array(rows, dtype=np.int64))
        if self.extra is not None and denoiser.extra is not None:
            self.extra.copy_(denoiser.extra)
        for part, forward in zip(self.parts, _forwards(denoiser)):
            for kept, given in zip([*part.states, *part.alone], [*forward.states, *forward.alone]):
                if kept is not None:
                    fill(kept, given)

    def _stage(self, part: _Part, sessions: list[RecordedSession], step: int) -> None:
        """One network evaluation and S <- M S, all rows from device memory."""
        for session in sessions:
            session.begin(step)
        x = self.x if not self.scaled else ops.lincomb(self.c_in, self.stage, [self.x])
        row = self.time_rows.index_select(0, self.stage)
        outs = self.denoiser.predict(x, self.extra, part.branches, self._networks(part, sessions, row))
        found = [outs] if isinstance(outs, Tensor) else outs
        columns = [self.x, *(self.x if y is None else y for y in found), self.noise, *self.registers]  # None weighs 0
        kept = [self.x, *self.registers]
        new = [ops.lincomb(self.matrices[:, k], self.stage, columns) for k in range(len(kept))]
        for buffer, value in zip(kept, new):
            buffer.copy_(value)
        self.stage.add_(1)

    def _networks(self, part: _Part, sessions: list[RecordedSession], row: Tensor
                  ) -> list[Callable[[Tensor], Tensor]]:
        """Of each group of pictures, with its conditions; a cache stands before it."""
        if not sessions:
            return [partial(_evaluate, self.unet, s, row, None) for s in part.states]
        found: list[Callable[[Tensor], Tensor]] = []
        for session, state, alone in zip(sessions, part.states, part.alone):
            own = alone if alone is not None and session.single(session.step) else state
            network = partial(_evaluate, self.unet, own, row, session)
            found.append(partial(session.evaluate, network, step=session.step, branches=len(part.branches)))
        return found

    def run(self, denoiser: Denoiser, table: StepTable, draw: NoiseFunction, callback: StepCallback | None,
            before_stage: Callable[[], None] | None) -> Tensor:
        """Replays the run that prepare() has made ready; as ``samplers.sample``."""
        sessions = [(s, b.nbytes) for s, b in zip(denoiser.sessions, self.held) if s is not None and b is not None]
        try:
            for index, kind in enumerate(self.order):
                if before_stage is not None:
                    before_stage()
                if table.needs_noise[index]:
                    self.noise.copy_(draw(index, self.x), non_blocking=True)
                kind.replay()
                for (session, held), did in zip(sessions, kind.did):
                    did.count(session, index, held)
                if callback is not None and table.step_end[index]:
                    step = int(table.step_index[index])
                    answer = callback(step, float(table.timesteps[step]), self.x.clone())
                    if answer is not None:
                        self.x.copy_(answer)
        except StopSampling:
            pass
        return self.x.clone()


def _evaluate(unet: Any, state: State, row: Tensor, cache: RecordedSession | None, sample: Tensor) -> Tensor:
    step = state.step_at(row, len(sample))
    return unet.run(sample, step if cache is None else with_cache(step, cache))
