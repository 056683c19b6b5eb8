"""What the shell's classes share: from a diffusers config to a table, and one stage of it on tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ... import ops
from ...errors import LdmfastError
from ..configs import CLASS_DEFAULTS
from ..registry import make_table
from ..schedules import Array, Schedule
from ..step_table import StepTable


class SchedulerError(LdmfastError, ValueError):
    """A call that a scheduler cannot answer. Also a ValueError, which callers of diffusers' schedulers catch."""


# Any, because mypy sees diffusers' placeholders for a missing torch
parents: Any = diffusers


def shell(cls: Any) -> Any:
    """Wrap the constructor and ``set_timesteps`` of the diffusers parent, keeping their signatures: diffusers
    reads its config keys from the one, pipelines look for ``timesteps``, ``sigmas`` and ``mu`` in the other."""
    parent = cls.__bases__[1]
    signature = inspect.signature(parent.set_timesteps)

    @functools.wraps(parent.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # diffusers writes the library of model_index.json from here: what is saved loads without ldmfast
        self.__module__ = parent.__module__
        parent.__init__(self, *args, **kwargs)
        self._read_config(None)
        self._ready = True

    @functools.wraps(parent.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        parent.set_timesteps(self, *args, **kwargs)
        self._begin_run(signature.bind(self, *args, **kwargs).arguments)

    cls._parent = parent
    cls.__init__ = __init__
    cls.set_timesteps = set_timesteps
    return cls


class TableScheduler:
    """Left base of every class here; the right one is diffusers' class of the same name.

    All state is the instance's own: the tables of this run (``_tables``), and what diffusers keeps too.
    """

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Any:
            """What the diffusers parent has."""

    _parent: ClassVar[Any]
    _has_x0: ClassVar[bool] = True
    # diffusers' sigma-space and DPM classes return the model's dtype, the others what the tensors promote to
    _output_like_model: ClassVar[bool] = False
    # Euler's and ancestral Euler's constructors leave a list of timesteps that can be walked
    _needs_run: ClassVar[bool] = True
    _ready = False
    _run: dict[str, Any] | None = None
    _tables: dict[Any, StepTable]
    _levels: tuple[Tensor, Any] | None = None
    _held: tuple[Any, Any, Schedule] | None = None

    # --- config to schedule

    def _settings(self) -> dict[str, Any]:
        """The config as the class's own settings; a setting we do not know counts unless it is at its default."""
        parameters = inspect.signature(self._parent.__init__).parameters
        known = CLASS_DEFAULTS[self._parent.__name__]
        config = self.config
        return {key: config[key] for key, parameter in parameters.items()
                if key in config and (key in known or config[key] != parameter.default)}

    def _read_config(self, abar: Tensor | None) -> Schedule:
        """The schedule of the config; on the given abar, which is diffusers' float32 list, not our float64 one:
        near t = 0 its rounding changes 1 - abar in the fourth digit, and the pictures must agree."""
        settings = self._settings() | {"trained_betas": None, "_class_name": self._parent.__name__}
        schedule = Schedule.from_config(settings)
        if schedule.use_dynamic_shifting and not self._parent.__name__.startswith("FlowMatch"):
            schedule = replace(schedule, use_dynamic_shifting=False)  # theirs is flow_shift until a mu is given
        if abar is None:
            return schedule
        values = abar.double().cpu().numpy().copy()
        if schedule.rescale_betas_zero_snr:
            values[-1] = 0  # some classes store the floor, which the schedule puts there itself
        betas = 1 - values / np.append(1.0, values[:-1])
        return replace(schedule, trained_betas=tuple(betas.tolist()), config=None)

    def _schedule(self) -> Schedule:
        """The schedule, read anew when config or abar were replaced: pipelines do both."""
        config, abar = self._internal_dict, getattr(self, "alphas_cumprod", None)
        if self._held is None or self._held[0] is not config or self._held[1] is not abar:
            self._held = config, abar, self._read_config(abar)
            self._tables = {}
        return self._held[2]

    # --- run to table

    def _begin_run(self, given: dict[str, Any]) -> None:
        """After diffusers' ``set_timesteps``, which also runs inside some constructors: no table is made there."""
        run = self._lists(given)
        if run != self._run:
            self._run, self._tables = run, {}
        self._levels = self.timesteps, getattr(self, "sigmas", None)
        if not self._ready:
            return
        stages, times = self._table().num_stages, len(self.timesteps)
        if stages != times:
            raise SchedulerError(f"{self._parent.__name__}: diffusers spaces these settings into {times} evaluations, "
                                 f"the table into {stages}; use another number of steps or timestep_spacing")

    def _lists(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of ``make_table`` from those of ``set_timesteps``."""
        train = given.get("num_train_timesteps")
        own = self.config.num_train_timesteps
        if train not in (None, own):
            raise SchedulerError(f"set_timesteps: num_train_timesteps={train}, the config has {own}; leave it out, or "
                                 "set it in the config")
        lists = {key: floats(given.get(key)) for key in ("timesteps", "sigmas")}
        steps = given.get("num_inference_steps") if all(v is None for v in lists.values()) else None
        dynamic = self.config.get("use_dynamic_shifting")  # without it diffusers ignores mu
        return {"steps": steps, **lists, "mu": given.get("mu") if dynamic else None}

    def _table(self, start: int = 0, **options: Any) -> StepTable:
        schedule = self._schedule()
        if self._run is None:
            raise SchedulerError(f"{self._parent.__name__}: there are no timesteps yet; call set_timesteps first")
        if self._run["mu"] is not None:
            schedule = replace(schedule, use_dynamic_shifting=True)
        run = self._run
        return self._kept((start, *options.items()), lambda: make_table(schedule, None, start=start, **run, **options))

    def _kept(self, key: Any, make: Callable[[], StepTable]) -> StepTable:
        """A table that does not depend on the run, kept for the next one. The key says all it was made from."""
        if key not in self._tables:
            if len(self._tables) >= 2048:
                self._tables.clear()
            self._tables[key] = make()
        return self._tables[key]

    def _stage(self, timestep: Any) -> int:
        """The step index, found from the timestep at the first step. Timesteps and sigmas that were replaced by
        other values since ``set_timesteps`` are refused: the table would not follow them."""
        if self._needs_run and self._run is None:
            raise SchedulerError(f"{self._parent.__name__}: there are no timesteps yet; call set_timesteps first")
        now = self.timesteps, getattr(self, "sigmas", None)
        for name, new, old in zip(("timesteps", "sigmas"), now, self._levels or now):
            if new is not old and not (new.shape == old.shape and torch.equal(new.cpu(), old.cpu())):
                raise SchedulerError(f"{self._parent.__name__}: {name} were replaced after set_timesteps; give them to "
                                     "set_timesteps, or use diffusers' own class")
        self._levels = now
        if self.step_index is None:
            self._init_step_index(timestep)
        index = self.step_index
        if not 0 <= index < len(now[0]):
            raise SchedulerError(f"{self._parent.__name__}: step {index} of {len(now[0])}: the run is over; call "
                                 "set_timesteps before the next")
        return int(index)

    # --- tensors

    def _advance(self, table: StepTable, stage: int, sample: Tensor, model_output: Tensor,
                 registers: Sequence[Tensor | None] = (), noise: Tensor | None = None,
                 ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """(x, registers, predicted picture) after a stage, in fp32 (fp64 if the sample is)."""
        x = sample if sample.dtype == torch.float64 else sample.float()
        columns: list[Tensor | None] = [x, model_output, noise]
        x0 = None
        if self._has_x0 or table.clip is not None:
            x0 = _combine(table, stage, -1, columns)
        if table.clip is not None and x0 is not None:
            x0 = table.clip(x0)
            columns.append(x0)
        columns += registers
        new = [_combine(table, stage, row, columns) for row in range(1 + table.num_registers)]
        return new[0], new[1:], x0

    def _dtype(self, sample: Tensor, model_output: Tensor) -> torch.dtype:
        return model_output.dtype if self._output_like_model else torch.promote_types(sample.dtype, model_output.dtype)

    def _finish(self, output: Any, return_dict: bool, sample: Tensor, model_output: Tensor, prev: Tensor,
                x0: Tensor | None = None, x0_name: str = "pred_original_sample") -> Any:
        """The step's answer as diffusers packs it."""
        dtype = self._dtype(sample, model_output)
        values = {"prev_sample": prev.to(dtype)}
        if self._has_x0 and x0 is not None:
            # where diffusers upcasts the sample, its predicted picture stays upcast
            values[x0_name] = x0 if self._output_like_model else x0.to(dtype)
        return output(**values) if return_dict else tuple(values.values())


def draw(like: Tensor, generator: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Noise from diffusers' own function: the same stream for the same generators, on any device."""
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype or like.dtype)


def refuse_integer(timestep: Any, name: str) -> None:
    """The index of a loop in place of a timestep: the classic mistake with the sigma-space schedulers."""
    if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
        raise SchedulerError(f"{name}.step: timestep={timestep} is an integer; pass one of scheduler.timesteps")


def combine(row: Array, tensors: Sequence[Tensor]) -> Tensor:
    """sum_j row[j] * tensors[j] in one pass; with autograd where a gradient is asked for."""
    return _sum(torch.tensor(row[None], device=tensors[0].device), tensors)


def _sum(row: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        first, *rest = row[0].tolist()
        return sum((c * t for c, t in zip(rest, tensors[1:])), first * tensors[0])
    return ops.lincomb(row, 0, tensors)


def _combine(table: StepTable, stage: int, row: int, columns: Sequence[Tensor | None]) -> Tensor:
    """Row ``row`` of a stage, or with -1 its predicted picture. A column that is None counts as zero."""
    x: Any = columns[0]
    cache = table.__dict__.setdefault("_shell_rows", {})
    key = stage, row, x.device, tuple(t is None for t in columns)
    if key not in cache:
        coefficients = table.x0_rows[stage] if row < 0 else table.matrices[stage, row]
        used = [int(j) for j in np.flatnonzero(coefficients) if columns[j] is not None]
        if not row or len(used) != 1 or coefficients[used[0]] != 1:
            # x leads: it gives the result its dtype and layout, and is not read where its coefficient is zero
            used = [0, *(j for j in used if j)]
            cache[key] = used, torch.tensor(coefficients[None, used], device=x.device)
        else:
            cache[key] = used, None
    used, weights = cache[key]
    tensors: list[Any] = [columns[j] for j in used]
    return tensors[0] if weights is None else _sum(weights, tensors)


def floats(values: Any) -> list[float] | None:
    if values is None:
        return None
    return [float(v) for v in (values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values)]
