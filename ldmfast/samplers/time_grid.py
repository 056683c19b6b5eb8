"""A run's steps as two lists: noise levels for the solver's coefficients, and times for the network."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LdmfastError
from .registry import find_solver, make_table, solver_options
from .schedules import Schedule
from .step_table import StepTable

_FIELDS = ("solver", "sigmas", "network_times", "options", "guidance_scale", "error", "default_error")


@dataclass(frozen=True)
class TimeGrid:
    """The steps of one solver, such as ``learn_grid`` finds (LD3: Tong et al. 2024 keep the same two lists).

    sigmas: as ``make_table`` takes them (with the run's end, but for flow schedules). network_times: one a stage, what
    the network is told, in any order. options: more of the solver's. guidance_scale: the one it was learned with, if
    known.
    error, default_error: mean over the pictures of the root mean square difference from a fine solve, of this grid and
    of the solver's usual one. Raises LdmfastError for an unknown solver or option.
    """

    solver: str
    sigmas: tuple[float, ...]
    network_times: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    guidance_scale: float | None = None
    error: float | None = None
    default_error: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.solver, str):
            raise LdmfastError(f"grid: solver is {str(self.solver)[:80]}, must be a name")
        find_solver(self.solver)
        if not isinstance(self.options, Mapping):
            raise LdmfastError(f"grid: options is {str(self.options)[:80]}, must be a table of solver options")
        known = solver_options(self.solver)
        for name in self.options:
            if name not in known:
                raise LdmfastError(f"grid: {name!r} is no option of {self.solver}, which takes "
                                   f"{', '.join(known) or 'none'}")

    @classmethod
    def of(cls, value: Any) -> TimeGrid:
        """A TimeGrid itself, its dictionary, or the JSON file that holds it. Raises LdmfastError."""
        if isinstance(value, TimeGrid):
            return value
        where = "grid"
        if isinstance(value, (str, os.PathLike)):
            where = str(value)
            try:
                value = json.loads(Path(value).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise LdmfastError(f"{where}: not a readable time grid ({error}); write one with "
                                   "`ldmfast tune-steps`") from error
        if not isinstance(value, Mapping) or not {"solver", "sigmas", "network_times"} <= set(value) <= set(_FIELDS):
            raise LdmfastError(f"{where}: a time grid has solver, sigmas and network_times, and may have "
                               f"{', '.join(_FIELDS[3:])}")
        lists = {name: _numbers(where, name, value[name]) for name in ("sigmas", "network_times")}
        return cls(**{**value, **lists})

    @property
    def evaluations(self) -> int:
        """Of the network, in a whole run."""
        return len(self.network_times)

    def table(self, schedule: Schedule, **options: Any) -> StepTable:
        """``make_table`` on this grid. A run that starts later (strength, start) keeps the last network times.
        Raises LdmfastError where there is not one time for each evaluation of a whole run."""
        def part(**more: Any) -> StepTable:
            return make_table(schedule, self.solver, sigmas=list(self.sigmas), **self.options, **more)

        table = part(**options)
        later = table.start > 0
        whole = part(**{k: v for k, v in options.items() if k not in ("strength", "start")}) if later else table
        if whole.num_stages != self.evaluations:
            raise LdmfastError(f"grid: {self.evaluations} network_times for {whole.num_stages} evaluations "
                               f"({whole.num_steps} steps of {self.solver}); give one for each")
        return table.with_network_times(self.network_times[self.evaluations - table.num_stages:])

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, under its name only when whole. Raises LdmfastError."""
        from ..pipelines.output import replacing

        target = Path(path)
        try:
            with replacing(target) as file:
                file.write(json.dumps(self.to_dict(), indent=1).encode())
        except OSError as error:
            raise LdmfastError(f"{target}: cannot be written ({error.strerror or error}); give another path") from error


def _numbers(where: str, name: str, values: Any) -> tuple[float, ...]:
    try:
        found = () if isinstance(values, str) else tuple(float(v) for v in values)
    except (TypeError, ValueError):
        found = ()
    if not found or not all(math.isfinite(v) for v in found):
        raise LdmfastError(f"{where}: {name} is {str(values)[:80]}, must be a list of finite numbers")
    return found
