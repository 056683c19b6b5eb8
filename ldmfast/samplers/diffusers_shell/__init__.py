"""diffusers' schedulers over ldmfast's step tables: the same names, the same surface, our arithmetic.

    from ldmfast.samplers.diffusers_shell import DPMSolverMultistepScheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

Each class is a subclass of diffusers' class of the same name. What is not a step (config, saving, timesteps,
``add_noise``, ``scale_model_input``, begin and step index) is inherited and thus diffusers' own; ``step`` reads a
stage of the stateless table that ``make_table`` gives for the same config, and agrees with diffusers to 1e-5, or to
what diffusers itself loses in float32 where that is more (DEIS of order 3, Heun and ancestral DPM2 at small sigmas).
A pipeline saved with one of these names diffusers as the library, so that it loads where ldmfast is not
installed. Importing this package imports diffusers.
"""

from __future__ import annotations

from .base import SchedulerError
from .by_time import DDIMScheduler, DDPMScheduler, PNDMScheduler
from .multistep import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
from .single_step import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from .two_stage import (
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
)

__all__ = [
    "DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SchedulerError",
    "TCDScheduler", "UniPCMultistepScheduler",
]
