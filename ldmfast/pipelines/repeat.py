"""Make a picture again from the settings its PNG carries, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import guidance
from ..caches import from_settings
from ..errors import LdmfastError
from .lora import check_loras, weights_of
from .output import PipelineOutput
from .run import digest

if TYPE_CHECKING:
    from .pipeline import Pipeline

_CALL = ("height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale", "guidance_rescale",
         "eta", "solver", "clip_skip")


def check_settings(pipe: Pipeline, settings: dict[str, Any], image: Any, mask_image: Any) -> None:
    missing = [k for k in (*_CALL, "precision", "mode", "seed", "prompt") if k not in settings]
    if missing:
        raise LdmfastError(f"the settings lack {missing[0]!r}: they were not written by this version of ldmfast")
    if settings.get("fingerprint") != pipe.loaded.fingerprint:
        raise LdmfastError(f"the picture was made with model {settings.get('model')!r} (fingerprint "
                           f"{settings.get('fingerprint')}), this is {pipe.source!r} ({pipe.loaded.fingerprint})")
    if settings["precision"] != pipe.precision:
        raise LdmfastError(f"the picture was made with precision={settings['precision']!r}, this pipeline has "
                           f"{pipe.precision!r}: load it with the same")
    if settings.get("vae_tiling", pipe.vae_tiling) != pipe.vae_tiling:
        raise LdmfastError(f"the picture was made with vae_tiling={settings['vae_tiling']}: call enable_vae_tiling() "
                           "or disable_vae_tiling() first")
    if not settings.get("repeatable", False) or settings["seed"] is None:
        raise LdmfastError("the picture cannot be repeated: its call was given latents, embeddings, a callback "
                           "or a generator whose state no seed tells")
    check_loras(pipe, settings)
    for name, value in (("image", image), ("mask_image", mask_image)):
        wanted = settings.get(name)
        if wanted is not None and value is None:
            raise LdmfastError(f"the picture was made from another one: give the same {name}")
        if digest(value) != wanted:
            raise LdmfastError(f"{name} is not the one the picture was made from "
                               f"(hash {digest(value)}, needs {wanted})")


def repeat(pipe: Pipeline, settings: dict[str, Any], *, image: Any, mask_image: Any, progress: bool) -> PipelineOutput:
    """See Pipeline.repeat. A picture that was made in a batch in a precision other than "exact" is made again in
    the same batch, because there its bits may depend on its neighbours."""
    check_settings(pipe, settings, image, mask_image)
    rows = settings.get("batch") or [settings]
    arguments: dict[str, Any] = {k: settings[k] for k in _CALL}
    if arguments["timesteps"] is not None or arguments["sigmas"] is not None:
        arguments["num_inference_steps"] = None
    if settings.get("grid") is not None:
        arguments.update(grid=settings["grid"], num_inference_steps=None, solver=None)
    if settings["prompt"] is not None:
        arguments["prompt"] = [row["prompt"] for row in rows]
        if settings["negative_prompt"] is not None:
            arguments["negative_prompt"] = [row["negative_prompt"] for row in rows]
    else:
        arguments["num_images_per_prompt"] = len(rows)
    if settings.get("class_label") is not None:
        arguments["class_labels"] = [row["class_label"] for row in rows]
    arguments["prompt_weighting"] = settings.get("prompt_weighting", False)  # older pictures have no word of it
    if settings["mode"] != "text2img":
        arguments.update(image=image, mask_image=mask_image, strength=settings["strength"])
    for name in ("original_size", "target_size", "crops_coords_top_left"):
        if settings.get(name) is not None:
            arguments[name] = tuple(settings[name])
    arguments["loras"] = [weights_of(row) for row in rows]
    for name in ("use_resolution_binning", "max_sequence_length"):
        if settings.get(name) is not None:
            arguments[name] = settings[name]
    arguments["cache"] = from_settings(settings.get("cache"))
    arguments["guidance"] = guidance.from_settings(settings.get("guidance"))
    out = pipe(**arguments, generator=[row["seed"] for row in rows], progress=progress)
    assert isinstance(out, PipelineOutput)
    index = settings.get("index", 0) if settings.get("batch") else 0
    return PipelineOutput([out.images[index]], [out.settings[index]], out.cancelled, report=out.report)
