"""Samplers: a solver is a table of coefficients, the loop runs any table.

    schedule = Schedule.from_config(json.load(open("scheduler/scheduler_config.json")))
    table = make_table(schedule, "dpmpp_2m", 20, guidance=7.5)
    x = sample(denoise, noise * table.init_noise_sigma, table=table)
"""

from __future__ import annotations

from .bridge import Bridge, bridge
from .configs import CLASS_TO_SOLVER, SOLVER_TO_CLASS, solver_of
from .groups import representation_guidance, sample_stages
from .learn_grid import learn_grid
from .network_inputs import soft_mixture, time_buckets
from .registry import SOLVERS, make_table, solver_options, start_step
from .sample import StopSampling, sample
from .schedules import Schedule
from .sit import Interpolant, sit
from .step_table import Clip, StepTable, TableBuilder
from .time_grid import TimeGrid

__all__ = [
    "CLASS_TO_SOLVER", "SOLVERS", "SOLVER_TO_CLASS", "Bridge", "Clip", "Interpolant", "Schedule", "StepTable",
    "StopSampling", "TableBuilder", "TimeGrid", "bridge", "learn_grid", "make_table",
    "representation_guidance", "sample", "sample_stages", "sit", "soft_mixture", "solver_of", "solver_options",
    "start_step", "time_buckets",
]
