"""What a recorded stage reads of a call's conditions: their tensors, and buffers of the same shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.joint_blocks import JointState
from ..models.transformer_blocks import TransformerState
from ..models.unet_state import UNetState

State = UNetState | TransformerState | JointState


def by_time(state: Any) -> tuple[Tensor, ...]:
    """The tensors whose first dimension are the timesteps of a call."""
    if isinstance(state, UNetState):
        return (state.times,)
    if isinstance(state, TransformerState):
        return () if state.rows is None else (state.rows, state.last)
    return tuple(state.modulations)


def of_call(state: Any) -> tuple[Tensor, ...]:
    """Those that all steps share: prompts, masks, angles."""
    if isinstance(state, JointState):
        return (state.text, *(() if state.rope is None else state.rope))
    prompts = [t for pair in state.prompts for t in pair]
    more = [state.prompt_bias, state.which if isinstance(state, TransformerState) else None]
    return (*prompts, *(t for t in more if t is not None))


def shape_of(state: Any) -> tuple[Any, ...]:
    """What a recorded stage depends on of a state; its numbers are not in it."""
    fixed = tuple((tuple(t.shape), t.dtype) for t in of_call(state))
    widths = state.widths if isinstance(state, UNetState) else None
    absent = (None if isinstance(state, JointState) else state.prompt_bias is None)
    spans = state.spans if isinstance(state, TransformerState) else ()
    timed = tuple((tuple(t.shape[1:]), t.dtype) for t in by_time(state))
    return type(state).__name__, spans, timed, fixed, widths, absent


def room(state: Any, rows: int) -> Any:
    """Empty buffers like a state's tensors, for ``rows`` timesteps."""
    timed = iter([t.new_zeros(rows, *t.shape[1:]) for t in by_time(state)])
    fixed = iter([torch.zeros_like(t) for t in of_call(state)])  # not empty: what is an index must be one
    if isinstance(state, JointState):
        return replace(state, rows={}, modulations=tuple(timed), text=next(fixed),
                       rope=None if state.rope is None else (next(fixed), next(fixed)))
    prompts = tuple((next(fixed), next(fixed)) for _ in state.prompts)
    bias = None if state.prompt_bias is None else next(fixed)
    if isinstance(state, UNetState):
        return UNetState({}, next(timed), state.widths, prompts, bias, state.batch)
    return replace(state, times={}, which=None if state.which is None else next(fixed), rows=next(timed),
                   last=next(timed), prompts=prompts, prompt_bias=bias, at=None)


def with_cache(step: Any, cache: Any) -> Any:
    """The part of a state for one evaluation, with the cache that the network asks."""
    return step._replace(cache=cache) if hasattr(step, "_replace") else replace(step, cache=cache)


def fill(kept: Any, given: Any) -> None:
    """A call's numbers into the buffers."""
    for buffer, values in zip(by_time(kept), by_time(given)):
        buffer[: len(values)].copy_(values)
    buffers, numbers = list(of_call(kept)), list(of_call(given))
    if buffers:
        torch._foreach_copy_(buffers, numbers)
