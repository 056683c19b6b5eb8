"""A run's steps as two lists: noise levels for the solver's coefficients, and times for the network."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LdmfastError
from .registry import find_solver, make_table
from .schedules import Schedule
from .step_table import StepTable

_FIELDS = ("solver", "sigmas", "network_times", "options", "guidance_scale", "error", "default_error")


@dataclass(frozen=True)
class TimeGrid:
    """The steps of one solver, such as ``learn_grid`` finds (LD3: Tong et al. 2024 keep the same two lists).

    sigmas: as ``make_table`` takes them (with the run's end, but for flow schedules). network_times: one a stage, what
    the network is told. options: more of the solver's. guidance_scale: the one it was learned with, if known.
    error, default_error: mean over the pictures of the root mean square difference from a fine solve, of this grid and
    of the solver's usual one.
    """

    solver: str
    sigmas: tuple[float, ...]
    network_times: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    guidance_scale: float | None = None
    error: float | None = None
    default_error: float | None = None

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
            except (OSError, ValueError) as error:
                raise LdmfastError(f"{where}: not a readable time grid ({error}); write one with "
                                   "`ldmfast tune-steps`") from error
        if not isinstance(value, Mapping) or not {"solver", "sigmas", "network_times"} <= set(value) <= set(_FIELDS):
            raise LdmfastError(f"{where}: a time grid has solver, sigmas and network_times, and may have "
                               f"{', '.join(_FIELDS[3:])}")
        find_solver(value["solver"])
        if not isinstance(value.get("options", {}), Mapping):
            raise LdmfastError(f"{where}: options is {str(value['options'])[:80]}, must be a table of solver options")
        lists = {name: _numbers(where, name, value[name]) for name in ("sigmas", "network_times")}
        return cls(**{**value, **lists})

    @property
    def evaluations(self) -> int:
        """Of the network, in a whole run."""
        return len(self.network_times)

    def table(self, schedule: Schedule, **options: Any) -> StepTable:
        """``make_table`` on this grid. A run that starts later (strength, start) keeps the last network times."""
        table = make_table(schedule, self.solver, sigmas=list(self.sigmas), **self.options, **options)
        return table.with_network_times(self.network_times[max(self.evaluations - table.num_stages, 0):])

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, under its name only when whole. Raises LdmfastError."""
        target = Path(path)
        if not target.parent.is_dir():
            raise LdmfastError(f"folder {target.parent} does not exist: create it or choose another name")
        handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".json.part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.to_dict(), file, indent=1)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _numbers(where: str, name: str, values: Any) -> tuple[float, ...]:
    try:
        found = () if isinstance(values, str) else tuple(float(v) for v in values)
    except (TypeError, ValueError):
        found = ()
    if not found or not all(math.isfinite(v) for v in found):
        raise LdmfastError(f"{where}: {name} is {str(values)[:80]}, must be a list of finite numbers")
    return found
