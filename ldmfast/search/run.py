"""A search among the pictures of a pipeline."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import LdmfastError
from ..pipelines.guided import Guided
from ..pipelines.open_call import open_call
from ..pipelines.output import to_output
from ..pipelines.run import decode
from ..samplers.sample import Denoiser
from ..torch_modes import ordinary, own_modes
from .methods import BestOfN, Method, PathSearch
from .problem import Found, Problem, Verifier

if TYPE_CHECKING:
    from ..pipelines import Pipeline

_NOT_HERE = ("cache", "latents", "generator", "num_images_per_prompt", "image", "mask_image", "strength",
             "callback_on_step_end", "settings")


@own_modes(torch.inference_mode)
def search(pipe: Pipeline, prompt: str, verifier: Verifier, method: Method | None = None, *, seed: int = 0,
           batch: int = 8, latent: bool = False, **call: Any) -> Found:
    """The picture of ``prompt`` that the verifier scores highest among those a method draws.

    verifier: (n, 3, H, W) pictures in [0, 1] to n numbers, higher is better; with ``latent`` it is given (n, C, h, w)
    latents, as ``output_type="latent"`` returns them, and nothing is decoded but the picture found. method: default
    BestOfN(8). seed: of the first picture; the next ones count on. batch: pictures that share a forward. call: further
    arguments of the pipeline, such as num_inference_steps, solver and guidance_scale; not a picture to start from, a
    callback or settings. The picture of a PixArt that bins sizes has the binned one. Raises LdmfastError.
    """
    if not isinstance(prompt, str):
        raise LdmfastError(f"search: prompt is a {type(prompt).__name__}, needs one text; search for each on its own")
    taken = [name for name in _NOT_HERE if call.get(name) is not None]
    if taken:
        raise LdmfastError(f"search: {taken[0]} has no place in a search, which draws noises of its own and takes runs "
                           "up inside; leave it out")
    first = open_call(pipe, prompt, generator=[torch.Generator()], **call)

    @lru_cache(maxsize=2)
    def opened_for(count: int) -> Guided:
        return cast(Guided, open_call(pipe, prompt, num_images_per_prompt=count, generator=0, **call).denoise)

    def denoiser(count: int) -> Denoiser:
        found = opened_for(count)
        found.restart()
        return cast(Denoiser, found)

    def unit_noise(generators: list[torch.Generator]) -> Tensor:
        opened = open_call(pipe, prompt, num_images_per_prompt=len(generators), generator=generators, **call)
        return opened.x / opened.table.init_noise_sigma

    def pixels(ends: Tensor) -> Tensor:
        return decode(pipe, _unpacked(pipe, ends, call))

    def verify(ends: Tensor) -> Any:
        return verifier(ends if latent else to_output(pixels(ends), "pt"))

    problem = Problem(first.table, denoiser, unit_noise, verify, seed=seed, batch=batch)
    method = method or BestOfN()
    best = method.run(problem)
    alone = isinstance(method, BestOfN)
    return Found(ordinary(best.ends), float(best.scores[0]), tuple(problem.history), problem.evaluations,
                 problem.verified, seed=best.seeds[0] if alone else None,
                 noise=None if isinstance(method, PathSearch) or best.noise is None else ordinary(best.noise),
                 picture=to_output(pixels(best.ends), "pil")[0])


def _unpacked(pipe: Pipeline, latents: Tensor, call: dict[str, Any]) -> Tensor:
    """FLUX keeps its latents as tokens."""
    unpack = getattr(pipe, "unpack", None)
    if unpack is None:
        return latents
    size: Any = pipe
    height, width = (call.get(k) or size.default_size for k in ("height", "width"))
    found: Tensor = unpack(latents, height, width)
    return found
