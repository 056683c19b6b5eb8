"""One measured call: its pictures and trajectory, time by step and part, evaluations, memory."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LdmfastError
from ..samplers import StepTable
from .metrics import Trajectory
from .settings import Settings, check_call, in_precision

PARTS = ("text", "denoise", "decode")


@dataclass(frozen=True)
class Drawn:
    """images: (n, 3, H, W) in [0, 1] on the CPU. seconds: of the whole call (``_now``). parts: "text" (until the
    network's first evaluation: text encoders, checks, all that is computed once), "denoise", "decode".
    step_seconds: of each step. evaluations: of the network, a picture (guidance branches that run together are one).
    rows: the same with each branch counted. memory: bytes at the peak over those before the call, None where that
    cannot be seen. made: the call's settings as a PNG keeps them. report: of its cache. table: of its solver.
    """

    images: Tensor
    trajectory: Trajectory
    seconds: float
    parts: dict[str, float]
    step_seconds: list[float]
    evaluations: float
    rows: float
    memory: int | None
    made: dict[str, Any]
    report: Any
    table: StepTable


@dataclass
class _Counter:
    """Forwards of one network in this thread."""

    network: torch.nn.Module
    calls: int = 0
    rows: int = 0
    first: float | None = None
    thread: int = field(default_factory=threading.get_ident)

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        if threading.get_ident() == self.thread:
            x = args[0] if args else kwargs["sample"]
            self.first = _now(x.device) if self.first is None else self.first
            self.calls += 1
            self.rows += len(x)

    def __enter__(self) -> _Counter:
        self.handle = self.network.register_forward_pre_hook(self._before, with_kwargs=True)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.handle.remove()


def _now(device: torch.device) -> float:
    """Seconds. With one thread on a CPU it is that thread's processor time, in which waiting for other processes does
    not count (that they slow memory and share caches does); otherwise the clock on the wall."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


class _Peak:
    """The most memory during a block, over what was there before: of the device, or resident in this process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, None

    def __enter__(self) -> _Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before: int | None = torch.cuda.memory_allocated(self.device)
            return self
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        self.before = _resident("VmRSS")
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - (self.before or 0)
        elif (high := _resident("VmHWM")) is not None and self.before is not None:
            self.bytes = max(0, high - self.before)

    bytes: int | None


def _resident(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":")), None)


def prepared(pipe: Any, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """A pipeline with the settings' precision and adapters, and the arguments of its calls."""
    found = copy.copy(in_precision(pipe, settings.precision))
    arguments = settings.call()
    weights = arguments.pop("loras", None)
    if weights is not None:  # made the active ones, so that the network that runs is the one that is counted
        found.set_adapters(list(weights), list(weights.values()))
    return found, arguments


def draw(pipe: Any, settings: Settings, prompts: Sequence[str], seeds: Sequence[int], call: dict[str, Any]) -> Drawn:
    """Draws the prompts in one call with everything measured. call: further arguments of the pipeline."""
    taken = {"prompt", "generator", "output_type", "callback_on_step_end", "progress", "settings",
             "num_images_per_prompt"}
    for name in [*(taken & call.keys()), *(settings.call().keys() & call.keys())]:
        raise LdmfastError(f"{name} is set by what is measured: leave it out")
    check_call(pipe, [*settings.call(), *call])
    one, arguments = prepared(pipe, settings)
    latents: list[Tensor] = []
    marks: list[float] = []
    tables: list[StepTable] = []

    def on_step(state: Any, step: int, timestep: float, given: dict[str, Tensor]) -> None:
        marks.append(_now(one.device))
        latents.append(given["latents"].clone())
        tables.append(state.table)

    with _Peak(one.device) as peak, _Counter(one.unet) as counter:
        start = _now(one.device)
        out = one(list(prompts), generator=list(seeds), output_type="pt", progress=False, callback_on_step_end=on_step,
                  **call, **arguments)
        end = _now(one.device)
    n, first = len(prompts), start if counter.first is None else counter.first
    if counter.first is None:  # CUDA graphs were replayed, which no hook sees: counted in a call without them
        eager = copy.copy(one)
        eager.engine = None
        with _Counter(one.unet) as counter:
            eager(list(prompts), generator=list(seeds), output_type="latent", progress=False, **call, **arguments)
    return Drawn(
        out.images.float().cpu(), Trajectory(latents, tables[0].noise_levels[1:]), end - start,
        {"text": first - start, "denoise": marks[-1] - first, "decode": end - marks[-1]},
        [b - a for a, b in zip([first, *marks], marks)],
        counter.calls / (n if one.precision == "exact" else 1), counter.rows / n, peak.bytes, out.settings[0],
        out.report, tables[0])

