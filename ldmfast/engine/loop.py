"""The sampling loop in fixed buffers: one recorded stage, replayed for every stage of any step table."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..models.transformer_blocks import PatchEmbed
from ..samplers.sample import NoiseFunction, StepCallback, StopSampling
from ..samplers.step_table import StepTable
from .graphs import Graphs
from .sides import Sides
from .state import State, fill, room, shape_of

if TYPE_CHECKING:
    from ..pipelines.denoiser import Denoiser

_LEAST_STAGES = 64  # 64 rows of times for SDXL are 10 MB; longer tables take the next power of two


def capacity(table: StepTable) -> int:
    """Rows of the buffers that hold this table."""
    return max(_LEAST_STAGES, 1 << (table.num_stages - 1).bit_length())


def key(denoiser: Denoiser, x: Tensor, table: StepTable) -> Hashable:
    """What a recorded stage depends on. Not in it, because it is read from buffers: coefficients, times, prompts,
    noise, the guidance scale (but where guidance is rescaled, which is not linear)."""
    states = [shape_of(s) for s in denoiser.states]
    plan = denoiser.plan
    rescaled = None if plan.linear else (plan.rescale, tuple(map(float, plan.weights[0])))
    extra = None if denoiser.extra is None else denoiser.extra.shape
    return (tuple(x.shape), x.dtype, denoiser.dtype, denoiser.branches, tuple(states), extra, rescaled, table.columns,
            bool((table.c_in == 1).all()), capacity(table), getattr(denoiser.unet, "fp8_attention", False))


class Loop:
    """Buffers of one key, and the recorded stage that reads and writes them.

    x, noise, registers: (pictures, C, h, w) fp32. stage: int64 (1,), the row of the table that comes next; the recorded
    stage counts it up itself. matrices: (capacity, 1 + registers, columns) and c_in: (capacity, 1), float64.
    """

    def __init__(self, denoiser: Denoiser, unet: nn.Module, x: Tensor, table: StepTable, graphs: Graphs) -> None:
        """unet: the denoiser's, or its like with adapters in buffers (``sides.own``)."""
        rows, device = capacity(table), x.device
        self.denoiser = copy.copy(denoiser)
        self.extra = None if denoiser.extra is None else torch.empty_like(denoiser.extra)
        self.states = [room(s, rows) for s in denoiser.states]
        # the call's own are not kept
        vars(self.denoiser).update(states=[], extra=None, unet=unet, unets=[], pipe=None, request=None,
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
        self.load(denoiser, x, table)
        self.replay = graphs.capture(self._stage)

    def load(self, denoiser: Denoiser, x: Tensor, table: StepTable) -> None:
        """Puts a call's start, conditions and coefficients into the buffers; the next stage is the first."""
        self.sides.load(denoiser.unet)
        self.x.copy_(x)
        self.stage.zero_()
        for register in self.registers:
            register.zero_()
        _put(self.matrices, table.matrices)
        _put(self.c_in, table.c_in[:, None])
        _put(self.time_rows, np.array([denoiser.row(t) for t in table.network_times.tolist()], dtype=np.int64))
        if self.extra is not None and denoiser.extra is not None:
            self.extra.copy_(denoiser.extra)
        for kept, given in zip(self.states, denoiser.states):
            fill(kept, given)

    def _stage(self) -> None:
        """One network evaluation and S <- M S, all rows from device memory."""
        x = self.x if not self.scaled else ops.lincomb(self.c_in, self.stage, [self.x])
        row = self.time_rows.index_select(0, self.stage)
        networks: list[Callable[[Tensor], Tensor]] = [partial(_evaluate, self.unet, s, row) for s in self.states]
        outs = self.denoiser.predict(x, self.extra, networks)
        columns = [self.x, *([outs] if isinstance(outs, Tensor) else outs), self.noise, *self.registers]
        kept = [self.x, *self.registers]
        new = [ops.lincomb(self.matrices[:, k], self.stage, columns) for k in range(len(kept))]
        for buffer, value in zip(kept, new):
            buffer.copy_(value)
        self.stage.add_(1)

    def run(self, table: StepTable, draw: NoiseFunction, callback: StepCallback | None,
            before_stage: Callable[[], None] | None) -> Tensor:
        """Replays the loaded run; as ``samplers.sample``."""
        try:
            for index in range(table.num_stages):
                if before_stage is not None:
                    before_stage()
                if table.needs_noise[index]:
                    self.noise.copy_(draw(index, self.x), non_blocking=True)
                self.replay()
                if callback is not None and table.step_end[index]:
                    step = int(table.step_index[index])
                    answer = callback(step, float(table.timesteps[step]), self.x.clone())
                    if answer is not None:
                        self.x.copy_(answer)
        except StopSampling:
            pass
        return self.x.clone()


def _evaluate(unet: Any, state: State, row: Tensor, sample: Tensor) -> Tensor:
    return unet.run(sample, state.step_at(row, len(sample)))


def _put(buffer: Tensor, values: np.ndarray) -> None:
    """Into the first rows. From pinned memory, so that nothing waits for the device."""
    host = torch.tensor(values)
    host = host.pin_memory() if buffer.is_cuda else host
    buffer[: len(host)].copy_(host, non_blocking=True)
