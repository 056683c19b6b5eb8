"""The loop: run a step table with any denoiser on tensors of any shape, dtype and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..errors import DeviceError, LdmfastError, ShapeError
from .registry import make_table
from .schedules import Schedule
from .step_table import Adapt, StepTable

Denoiser = Callable[[Tensor, float, int], "Tensor | Sequence[Tensor | None]"]
StepCallback = Callable[[int, float, Tensor], "Tensor | None"]
NoiseFunction = Callable[[int, Tensor], Tensor]
_DRAWN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # noise, whatever torch's defaults are
Generators = torch.Generator | Sequence[torch.Generator] | None


class StopSampling(Exception):
    """Raised by a callback (or the denoiser) to end a run early; ``sample`` returns the x it has."""


@dataclass(frozen=True)
class _Combination:
    """One lincomb: slot <- the sum of the columns named, its coefficients at ``offset`` of the flat table."""

    slot: int
    columns: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Stage:
    time: float
    scale: _Combination | None
    x0: _Combination | None
    noise: bool
    moves: tuple[tuple[int, int], ...]
    combinations: tuple[_Combination, ...]
    reads: tuple[bool, ...]
    step: int
    ends_step: bool
    step_time: float
    adapt: Adapt | None = None


@dataclass(frozen=True)
class Plan:
    """A table as the loop wants it: per stage the pointer moves and the combinations with their non-zero
    coefficients, all of them in one flat float64 tensor. Holds no state; threads may share it."""

    stages: tuple[Stage, ...]
    coefficients: Tensor


def compile_table(table: StepTable) -> Plan:
    """The plan of a table. Cheap (some hundred microseconds), cached on the table."""
    cached = table.__dict__.get("_plan")
    if cached is not None:
        return cached
    flat: list[float] = []
    columns = list(table.columns)
    first = len(columns) - table.num_registers
    slots = [0, *range(first, len(columns))]

    def combination(slot: int, row: np.ndarray) -> _Combination:
        # x leads even with coefficient zero: it gives the result its dtype and layout, and is not read then
        used = (0, *(int(j) for j in np.flatnonzero(row) if j))
        flat.extend(float(row[j]) for j in used)
        return _Combination(slot, used, len(flat) - len(used))

    stages = []
    live = _live_rows(table)
    for i in range(table.num_stages):
        moves, combinations = [], []
        for slot, row in zip(slots, table.matrices[i] * live[i][:, None]):
            nonzero = np.flatnonzero(row)
            if nonzero.size == 1 and row[nonzero[0]] == 1:
                if nonzero[0] != slot:
                    moves.append((slot, int(nonzero[0])))
            elif nonzero.size:
                combinations.append(combination(slot, row))
        scale = None if table.c_in[i] == 1 else combination(0, table.c_in[i] * np.eye(len(columns))[0])
        x0 = None
        if not table.linear and table.x0_rows[i].any():
            x0 = combination(columns.index("x0"), table.x0_rows[i])
        step = int(table.step_index[i])
        stages.append(Stage(
            float(table.network_times[i]), scale, x0, bool(table.needs_noise[i]), tuple(moves),
            tuple(combinations), tuple(bool(v) for v in table.needs_prediction[i]), step,
            bool(table.step_end[i]), float(table.timesteps[step]), table.adapts[i] if table.adapts else None))
    plan = Plan(tuple(stages), torch.tensor(flat, dtype=torch.float64, device="cpu"))
    table.__dict__["_plan"] = plan
    return plan


def _live_rows(table: StepTable) -> np.ndarray:
    """(stages, 1 + registers) bool: x, and the registers that a later stage reads; the others are not made. What adapts
    may read any."""
    first = len(table.columns) - table.num_registers
    live = np.ones((table.num_stages + 1, 1 + table.num_registers), dtype=bool)
    live[-1, 1:] = False
    for i in reversed(range(table.num_stages)) if not table.adapts else ():
        live[i, 1:] = (table.matrices[i][live[i + 1]][:, first:] != 0).any(axis=0)
    return live[1:]


def sample(denoise: Denoiser, x: Tensor, schedule: Schedule | None = None, solver: str | None = "dpmpp_2m",
           steps: int | None = 20, *, table: StepTable | None = None, generator: Generators = None,
           noise_fn: NoiseFunction | None = None, guidance: float | Sequence[float] | None = None,
           callback: StepCallback | None = None, **options: Any) -> Tensor:
    """Run a sampler from the state ``x`` and return the last state.

    x: (pictures, ...) of any floating dtype; the state at the start of the run, that is unit noise times
    ``table.init_noise_sigma``, or ``table.add_noise(source, noise)`` for image to image.
    denoise(x_in, t, stage) returns the network's prediction, shaped like x; with a guided table the pair
    (uncond, cond), or cond alone at a stage of guidance scale 1. It returns fresh tensors and leaves x_in as
    it is.
    Either ``table``, or ``schedule``, ``solver``, ``steps`` and ``options`` for ``make_table``.
    generator: a CPU torch.Generator for the batch, or one for each picture: then a picture's noise does not
    depend on its neighbours. Noise is drawn in fp32 on the CPU, then cast. noise_fn(stage, x) replaces that.
    callback(step, t, x) runs after each step and may return a replacement for x.
    StopSampling from callback or denoise ends the run; the x reached is returned.
    Raises LdmfastError, ShapeError (a prediction of another shape, a wrong number of generators),
    DeviceError (a generator that is not on the CPU).
    """
    table = _resolve(table, schedule, solver, steps, guidance, options)
    draw = noise_fn or noise_source(generator, x)
    plan = compile_table(table)
    coefficients = plan.coefficients.to(x.device)
    names = len(table.predictions)
    noise_column = 1 + names
    state: list[Any] = [x] * len(table.columns)
    try:
        for index, stage in enumerate(plan.stages):
            predict(denoise, state, coefficients, stage, index, names)
            if stage.noise:
                state[noise_column] = draw(index, state[0])
            advance(table, coefficients, stage, state)
            report(stage, state, callback)
    except StopSampling:
        pass
    return state[0]


def _resolve(table: StepTable | None, schedule: Schedule | None, solver: str | None, steps: int | None,
             guidance: float | Sequence[float] | None, options: dict[str, Any]) -> StepTable:
    if table is None:
        if schedule is None:
            raise LdmfastError("sample: needs a schedule (with solver and steps) or a table")
        table = make_table(schedule, solver, steps, **options)
    elif options:
        raise LdmfastError(f"sample: {', '.join(options)} has no effect with a finished table; give it to "
                           "make_table")
    return table if guidance is None else table.with_guidance(guidance)


def predict(denoise: Denoiser, state: list[Any], coefficients: Tensor, stage: Stage, index: int,
            names: int) -> None:
    """Evaluate the network into the prediction columns."""
    x = state[0]
    out = denoise(x if stage.scale is None else _combine(coefficients, stage.scale, state), stage.time, index)
    if names == 1:
        outs: Sequence[Any] = (out,) if isinstance(out, Tensor) else out
    elif isinstance(out, Tensor):
        if sum(stage.reads) != 1:
            raise ShapeError(f"sample: the denoiser returned one tensor at stage {index}, the table needs "
                             f"{names}")
        outs = [out if read else None for read in stage.reads]
    else:
        outs = out
    if len(outs) != names:
        raise ShapeError(f"sample: the denoiser returned {len(outs)} tensors at stage {index}, the table "
                         f"needs {names}")
    for k, (value, read) in enumerate(zip(outs, stage.reads)):
        if not read:
            continue
        if value is None:
            raise ShapeError(f"sample: the denoiser returned None for output {k} at stage {index}, which is "
                             "needed")
        if value.shape != x.shape:
            _check_shape(value, x, f"the prediction at stage {index}")
        state[1 + k] = value


def _combine(coefficients: Tensor, combination: _Combination, state: list[Any]) -> Tensor:
    n = len(combination.columns)
    row = coefficients.narrow(0, combination.offset, n).view(1, n)
    return ops.lincomb(row, 0, [state[j] for j in combination.columns])


def advance(table: StepTable, coefficients: Tensor, stage: Stage, state: list[Any]) -> None:
    """S <- M S: all results from the old state, then stored. Before it the picture is clipped where the table does, and
    the columns are made that are not linear."""
    if stage.x0 is not None:
        x0 = _combine(coefficients, stage.x0, state)
        state[stage.x0.slot] = x0 if table.clip is None else table.clip(x0)
    if stage.adapt is not None:
        for name, value in stage.adapt(dict(zip(table.columns, state))).items():
            state[table.columns.index(name)] = value
    results = [(slot, state[source]) for slot, source in stage.moves]
    results += [(c.slot, _combine(coefficients, c, state)) for c in stage.combinations]
    dtype = state[0].dtype
    for slot, value in results:
        state[slot] = value.to(dtype) if slot == 0 else value


def report(stage: Stage, state: list[Any], callback: StepCallback | None) -> None:
    """Calls back at the end of a step; the answer, if any, is the new x."""
    if stage.ends_step and callback is not None:
        replacement = callback(stage.step, stage.step_time, state[0])
        if replacement is not None:
            _check_shape(replacement, state[0], "the callback's x")
            state[0] = replacement


def noise_source(generator: Generators, x: Tensor) -> NoiseFunction:
    """noise(stage, like) in fp32 from CPU generators; one a picture where a list is given. Goes to a GPU from pinned
    memory, so that drawing it does not wait for what the GPU still has to do."""
    if not isinstance(generator, (list, tuple)):
        single: Any = generator
        _check_generator(single)
        return lambda stage, like: _to(torch.randn(like.shape, generator=single, **_DRAWN), like)
    generators = list(generator)
    if len(generators) != x.shape[0]:
        raise ShapeError(f"sample: {len(generators)} generators for {x.shape[0]} pictures; give one for each")
    for g in generators:
        _check_generator(g)

    def draw(stage: int, like: Tensor) -> Tensor:
        shape = (1, *like.shape[1:])
        noise = [torch.randn(shape, generator=g, **_DRAWN) for g in generators]
        return _to(torch.cat(noise) if noise else torch.empty(like.shape, **_DRAWN), like)

    return draw


def _to(noise: Tensor, like: Tensor) -> Tensor:
    noise = noise.pin_memory() if like.is_cuda else noise
    return noise.to(like.device, like.dtype, non_blocking=True)


def _check_generator(generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise LdmfastError(f"sample: generator is a {type(generator).__name__}, needs a torch.Generator or a "
                           "list of them")
    if generator is not None and generator.device.type != "cpu":
        raise DeviceError(f"sample: the generator is on {generator.device}; noise is drawn on the CPU, so "
                          "that a seed means the same picture everywhere: use torch.Generator('cpu')")


def _check_shape(value: Tensor, x: Tensor, what: str) -> None:
    if value.shape != x.shape:
        raise ShapeError(f"sample: {what} has shape {tuple(value.shape)}, the state has {tuple(x.shape)}; "
                         "they must be equal")
