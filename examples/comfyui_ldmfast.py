"""ComfyUI nodes that draw with ldmfast: put this file into ComfyUI/custom_nodes, and ldmfast into its Python.

"ldmfast: load" opens a diffusers folder or a single file; "ldmfast: draw" makes pictures from a prompt, from a picture,
or under a mask, and gives an IMAGE as every other node does. Prompts are read as ComfyUI reads them: weights, escapes,
and any length. Nothing here needs ComfyUI to be imported; where it is there, its progress bar and its Cancel are used.
"""

from __future__ import annotations

import os
from typing import Any

import torch

import ldmfast

SOLVERS = tuple(sorted(ldmfast.samplers.SOLVERS))


class LdmfastLoad:
    """path: a diffusers folder, a checkpoint file, or "tiny" for the model that ships with ldmfast."""

    RETURN_TYPES = ("LDMFAST_PIPELINE",)
    RETURN_NAMES = ("pipeline",)
    FUNCTION = "load"
    CATEGORY = "ldmfast"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"path": ("STRING", {"default": "tiny"}),
                             "precision": (["auto", "exact", "bf16", "int8"], {"default": "auto"})}}

    def load(self, path: str, precision: str) -> tuple[ldmfast.Pipeline]:
        if path == "tiny":
            return (ldmfast.Pipeline.tiny(precision=precision),)
        kind = ldmfast.Pipeline.from_pretrained if os.path.isdir(path) else ldmfast.Pipeline.from_single_file
        return (kind(path, precision=precision),)


class LdmfastDraw:
    """width, height: pixels, 0 for the model's own or the picture's. image: (B, H, W, 3) in [0, 1], to be redrawn with
    ``denoise``; mask: (B, H, W), 1 where it is. Returns an IMAGE, (B, H, W, 3) fp32 in [0, 1]."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "draw"
    CATEGORY = "ldmfast"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = {"multiline": True, "dynamicPrompts": True}
        size = {"default": 0, "min": 0, "max": 16384, "step": 8}
        return {
            "required": {
                "pipeline": ("LDMFAST_PIPELINE",),
                "positive": ("STRING", {"default": "a red circle above a blue square", **text}),
                "negative": ("STRING", {"default": "", **text}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
                "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
                "cfg": ("FLOAT", {"default": 4.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "sampler_name": (list(SOLVERS), {"default": "dpmpp_2m"}),
                "width": ("INT", size), "height": ("INT", size),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096}),
            },
            "optional": {
                "image": ("IMAGE",), "mask": ("MASK",),
                "denoise": ("FLOAT", {"default": 0.8, "min": 0.0, "max": 1.0, "step": 0.01}),
            },
        }

    def draw(self, pipeline: ldmfast.Pipeline, positive: str, negative: str, seed: int, steps: int, cfg: float,
             sampler_name: str, width: int, height: int, batch_size: int, image: torch.Tensor | None = None,
             mask: torch.Tensor | None = None, denoise: float = 0.8) -> tuple[torch.Tensor]:
        given: dict[str, Any] = {}
        if image is not None:
            given |= {"image": image.permute(0, 3, 1, 2), "strength": denoise}
        if mask is not None:
            given["mask_image"] = mask.unsqueeze(1)
        out = pipeline(positive, height or None, width or None, steps, negative_prompt=negative, guidance_scale=cfg,
                       num_images_per_prompt=batch_size, generator=seed, solver=sampler_name, prompt_weighting=True,
                       output_type="pt", progress=False, callback_on_step_end=_watched(steps), **given)
        return (out.images.permute(0, 2, 3, 1).float().cpu().contiguous(),)


def _watched(steps: int) -> Any:
    """Moves ComfyUI's progress bar after each step, and lets its Cancel through. None without ComfyUI."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    bar = ProgressBar(steps)

    def on_step(*_: Any) -> None:
        throw_exception_if_processing_interrupted()
        bar.update(1)
    return on_step


NODE_CLASS_MAPPINGS = {"LdmfastLoad": LdmfastLoad, "LdmfastDraw": LdmfastDraw}
NODE_DISPLAY_NAME_MAPPINGS = {"LdmfastLoad": "ldmfast: load", "LdmfastDraw": "ldmfast: draw"}
