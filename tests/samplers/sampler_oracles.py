"""Independent oracles for the samplers: diffusers driven step by step, and a plain numpy reading of a table."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmfast.samplers import StepTable

SHAPE = (2, 3, 4, 5)


def network(x: Tensor, t: float) -> Tensor:
    """A smooth nonlinear stand-in for a network: mixes neighbours, depends on the time, slope below one."""
    mixed = 0.6 * x + 0.2 * x.roll(1, -1) - 0.1 * x.roll(1, -2)
    return torch.tanh(mixed + 0.3 * np.sin(0.01 * t)) + 0.1 * torch.cos(x) * np.cos(0.003 * t)


class _Module:
    """A module whose float32 is float64: diffusers rounds its tables to float32, which would hide errors of ours
    below 1e-6. The scheduler's own code runs unchanged over it."""

    def __init__(self, module: Any, wide: Any) -> None:
        self._module = module
        self.float32 = wide

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def float64_tables(cls: type) -> Iterator[None]:
    module = sys.modules[cls.__module__]
    old = module.np, module.torch
    module.np, module.torch = _Module(np, np.float64), _Module(torch, torch.float64)  # type: ignore[attr-defined]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        module.np, module.torch = old  # type: ignore[attr-defined]
        torch.set_default_dtype(torch.float32)


def noises(count: int, seed: int = 7) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(count)]


@contextlib.contextmanager
def given_noise(cls: type, source: Callable[[], Tensor]) -> Iterator[None]:
    """diffusers' draw replaced by ours, so that both sides see the same noise."""
    module = sys.modules[cls.__module__]
    if not hasattr(module, "randn_tensor"):
        yield
        return
    old = module.randn_tensor
    module.randn_tensor = lambda *a, **k: source()
    try:
        yield
    finally:
        module.randn_tensor = old


def drive(cls: type, config: dict, steps: int, x: Tensor, *, wide: bool = True, noise: list[Tensor] | None = None,
          set_kwargs: dict | None = None, step_kwargs: dict | None = None, begin: int = 0) -> tuple[list, Any]:
    """x after every ``step`` of the diffusers scheduler, and the scheduler. noise[i] is used in stage i."""
    index = [0]
    stack = contextlib.ExitStack()
    with stack:
        if wide:
            stack.enter_context(float64_tables(cls))
        if noise is not None:
            stack.enter_context(given_noise(cls, lambda: noise[index[0]]))
        scheduler = cls(**config)
        scheduler.set_timesteps(**({"num_inference_steps": steps} if steps else {}), **(set_kwargs or {}))
        if begin and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        states = []
        for i, t in enumerate(scheduler.timesteps[begin:]):
            index[0] = i
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            e = network(scaled.double(), float(t))
            x = scheduler.step(e, t, x, **(step_kwargs or {})).prev_sample
            states.append(x.double())
    return states, scheduler


def unfold(table: StepTable, x: Tensor, predict: Callable[[Tensor, float, int], Tensor | tuple],
           noise: list[Tensor] | None = None) -> list[Tensor]:
    """x after every stage: the table's matrices multiplied out in float64, nothing of the runner involved."""
    states: dict[str, Tensor] = {name: torch.zeros_like(x) for name in table.columns}
    states["x"] = x
    slots = ["x", *[c for c in table.columns if c.startswith("r")]]
    out = []
    for i in range(table.num_stages):
        e = predict(table.c_in[i] * states["x"], float(table.network_times[i]), i)
        states.update(zip(table.predictions, (e,) if isinstance(e, Tensor) else e))
        if table.needs_noise[i]:
            assert noise is not None
            states["noise"] = noise[i]
        if not table.linear:
            raw = sum(float(c) * states[k] for k, c in zip(table.columns, table.x0_rows[i]))
            states["x0"] = table.clip(raw) if table.clip is not None else raw
        if table.adapts:
            states.update(table.adapts[i](states))
        new = [sum(float(c) * states[k] for k, c in zip(table.columns, row)) for row in table.matrices[i]]
        states.update(zip(slots, new))
        out.append(states["x"])
    return out


def relative_error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference over all stages, relative to the size of the state (at least 1)."""
    assert len(ours) == len(theirs), f"{len(ours)} stages, {len(theirs)} diffusers steps"
    return max(float((a - b).abs().max() / max(1.0, float(b.abs().max()))) for a, b in zip(ours, theirs))
