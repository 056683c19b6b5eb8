"""Learned time grids for a pipeline: the calibration pictures, their fine solve, and the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import LdmfastError
from ..guidance import check_guidance
from ..samplers import StepTable, TimeGrid, sample
from ..samplers import learn_grid as learn
from ..samplers.sample import Denoiser
from ..torch_modes import own_modes
from .inputs import texts_of, whole
from .open_call import OpenCall, open_call

if TYPE_CHECKING:
    from .pipeline import Pipeline

_NOT_HERE = ("image", "mask_image", "strength", "callback_on_step_end", "settings", "generator", "grid",
             "num_inference_steps")


@own_modes(torch.inference_mode)
def learn_grid(pipe: Pipeline, prompts: str | Sequence[str] | None = None, steps: int = 6, solver: str | None = None, *,
               pictures: int = 16, seed: int = 0, reference_steps: int | None = None, iterations: int = 8,
               progress: Callable[[int, float], None] | None = None, **call: Any) -> TimeGrid:
    """``samplers.learn_grid`` on ``pictures`` of this model, of the prompts in turn and of seeds from ``seed`` on.

    prompts: default captions of the shipped models' kind for these, else ``quantization.calibrate.PROMPTS``. solver:
    default dpmpp_2m, of a flow schedule flow_euler. reference_steps: of the fine solve, a second-order one
    (default: eight times ``steps``, 64 at least). iterations: at most; each costs about as many short runs as the grid
    has steps. call: arguments of the pipeline, guidance_scale for example: a grid suits the guidance and size that it
    was learned with. Not a picture to start from, a callback, settings or a guidance with momentum. Raises
    LdmfastError.
    """
    solver = solver or ("flow_euler" if pipe.schedule.flow else "dpmpp_2m")
    whole("steps", steps, 1)
    reference_steps = max(64, 8 * steps) if reference_steps is None else reference_steps
    whole("reference_steps", reference_steps, steps + 1)
    if call.get("cache") is not None:
        raise LdmfastError("learn_grid: what a cache reuses depends on the steps; learn them without a cache")
    named = [name for name in _NOT_HERE if call.get(name) is not None]
    if named:
        raise LdmfastError(f"learn_grid: {named[0]} has no place here: a grid is learned from whole runs of its own "
                           "seeds; leave it out, and say seed and steps")
    for one in check_guidance(call.get("guidance")):
        if one.remembers:
            raise LdmfastError(f"learn_grid: {type(one).__name__} remembers earlier evaluations, which learning does "
                               "not repeat; learn the steps without its momentum")
    texts = _captions(pipe, whole("pictures", pictures, 1)) if prompts is None else texts_of("prompts", prompts)
    texts = [texts[i % len(texts)] for i in range(pictures)]
    call = {**call, "generator": list(range(seed, seed + pictures))}
    fine = open_call(pipe, texts, solver="flow_heun" if pipe.schedule.flow else "dpmpp_2m",
                     num_inference_steps=reference_steps // 2 if pipe.schedule.flow else reference_steps, **call)
    target = sample(fine.denoise, fine.x, table=fine.table)
    noise: Tensor = fine.x / fine.table.init_noise_sigma

    def bind(grid: TimeGrid | int) -> tuple[StepTable, Denoiser]:
        which: dict[str, Any] = {"grid": grid} if isinstance(grid, TimeGrid) else {"num_inference_steps": grid,
                                                                                  "solver": solver}
        opened: OpenCall = open_call(pipe, texts, **which, **call)
        return opened.table, opened.denoise

    grid = learn(bind, noise, target, pipe.schedule, solver, steps, iterations=iterations, progress=progress)
    scale = call.get("guidance_scale", pipe.loaded.defaults.get("guidance_scale"))
    return grid if scale is None else replace(grid, guidance_scale=float(scale))


def _captions(pipe: Pipeline, count: int) -> Sequence[str]:
    from ..quantization.calibrate import PROMPTS
    from ..testing.scenes import sample_scenes
    from .pipeline import TINY

    if pipe.source not in TINY.values():
        return PROMPTS
    return [scene.caption for scene in sample_scenes(count, 7, "train")]
