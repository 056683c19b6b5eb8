"""Another solver for a diffusers pipeline: a scheduler of diffusers' class over our step tables."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import LdmfastError
from ..samplers.configs import CLASS_TO_SOLVER, SOLVER_TO_CLASS

# solvers that share a class of diffusers, by its settings
_SETTINGS = {
    "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    "dpmpp_3m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
}
_KEPT = "_ldmfast_scheduler"  # where a pipeline keeps the scheduler it had


def put(pipe: Any, solver: str) -> None:
    """Gives the pipeline the scheduler of ``solver`` (a name of ``ldmfast.samplers``, or of a class of diffusers), with
    the schedule of the one it has. Raises LdmfastError for another name, or for something without a scheduler."""
    shell = importlib.import_module("ldmfast.samplers.diffusers_shell")
    classes = SOLVER_TO_CLASS | {kind: kind for kind in CLASS_TO_SOLVER}
    kind = getattr(shell, classes.get(solver, ""), None)
    if kind is None:
        raise LdmfastError(f"solver {solver!r} is unknown; choose one of {', '.join(sorted(classes))}")
    current = getattr(pipe, "scheduler", None)
    if current is None:
        raise LdmfastError(f"solver={solver!r} was given, a {type(pipe).__name__} has no scheduler; leave it out")
    vars(pipe).setdefault(_KEPT, current)
    pipe.scheduler = kind.from_config(current.config, **_SETTINGS.get(solver, {}))


def take_back(pipe: Any) -> None:
    """The scheduler that the pipeline had, unless its user has chosen another one since."""
    kept = vars(pipe).pop(_KEPT, None)
    if kept is not None and type(pipe.scheduler).__module__.startswith("ldmfast."):
        pipe.scheduler = kept
