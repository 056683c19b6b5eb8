"""A call's arguments, checked and completed before any heavy work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..caches import Policy, check_cache
from ..errors import LdmfastError, ShapeError
from ..guidance import UNCOND, Guidance, Plan, check_guidance
from ..guidance import Call as Steps
from ..guidance.settle import check_suits, settle
from ..loras import Choice
from ..models import DiT, PixArt
from ..samplers import StepTable, TimeGrid, make_table
from .aspect_ratio import trained_size
from .inputs import (
    RandomSource,
    check_callback,
    check_lists,
    check_size,
    image_size,
    number,
    pair,
    random_source,
    texts_of,
    whole,
)
from .lora import choices
from .prompt_weights import weigh
from .t5_text import T5Encoder, check_limit

if TYPE_CHECKING:
    from .pipeline import Pipeline

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Request:
    """One call, complete: every default resolved, every value checked. ``pictures`` is prompts x images per prompt.
    ``table`` holds all step coefficients, guidance folded in where it is linear. ``loras``: each picture's adapters."""

    mode: str
    prompts: list[str] | None
    negative_prompts: list[str] | None
    prompt_embeds: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    pooled_prompt_embeds: torch.Tensor | None
    negative_pooled_prompt_embeds: torch.Tensor | None
    pictures: int
    per_prompt: int
    prompt_attention_mask: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None
    max_sequence_length: int
    height: int
    width: int
    asked_size: tuple[int, int]
    binned: bool
    steps: int
    timesteps: list[float] | None
    sigmas: list[float] | None
    guidance_scale: float
    guidance_rescale: float
    eta: float
    random: RandomSource
    latents: torch.Tensor | None
    image: Any
    mask_image: Any
    strength: float
    solver: str
    table: StepTable
    output_type: str
    clip_skip: int | None
    prompt_weighting: bool
    class_labels: torch.Tensor | None
    loras: tuple[Choice, ...]
    original_size: tuple[int, int]
    crops_coords_top_left: tuple[int, int]
    target_size: tuple[int, int]
    callback: Callable[..., Any] | None
    progress: bool
    guided: bool
    cache: tuple[Policy, ...]
    guidance: tuple[Guidance, ...]
    plan: Plan
    grid: TimeGrid | None

    @classmethod
    def resolve(cls, pipe: Pipeline, **a: Any) -> Request:
        defaults = pipe.loaded.defaults
        mode = _mode(pipe, a["image"], a["mask_image"])
        if a["output_type"] not in OUTPUT_TYPES:
            raise LdmfastError(f"output_type={a['output_type']!r} is unknown: use one of {', '.join(OUTPUT_TYPES)}")
        check_callback(a["callback_on_step_end"], a["callback_on_step_end_tensor_inputs"])
        check_lists(a)
        if a.get("clip_skip") is not None:
            whole("clip_skip", a["clip_skip"], 0)
        a["grid"] = grid_of(pipe, a)
        per_prompt = whole("num_images_per_prompt", a["num_images_per_prompt"], 1)
        default_scale = defaults.get("guidance_scale", 5.0 if len(pipe.loaded.text_encoders) == 2 else 7.5)
        scale = number("guidance_scale", default_scale if a["guidance_scale"] is None else a["guidance_scale"])
        strength = _strength(a["strength"], mode)
        rescale = number("guidance_rescale", a["guidance_rescale"])
        embedded = _config(pipe, "time_cond_proj_dim") is not None
        conditional = a["prompt"] is not None or a["prompt_embeds"] is not None or isinstance(pipe.unet, DiT)
        guidance = settle(a["guidance"], scale, scale > 1 and not embedded and conditional, rescale)
        check_suits(pipe.unet, guidance, conditional, embedded)
        plan = Plan.of(guidance, Steps.of(pipe.schedule, _table(pipe, a, strength), scale))
        guided, table = needs_uncond(plan), plan.table()
        if plan.texts and a["prompt"] is None:
            raise LdmfastError(f"a guidance has a prompt of its own, {plan.texts[0]!r}: give the call a prompt, too, "
                               "and not prompt_embeds")
        prompts, negatives, count = _prompts(pipe, a, guided)
        pictures = count * per_prompt
        asked = height, width = _size(pipe, a, mode)
        if a["use_resolution_binning"] and isinstance(pipe.unet, PixArt):
            height, width = trained_size(pipe.unet.config, height, width)
        check_size(height, width, _multiple(pipe))
        _check_latents(pipe, a["latents"], pictures, height, width)
        size = (height, width)
        return cls(
            mode=mode, prompts=prompts, negative_prompts=negatives if guided else None,
            prompt_embeds=a["prompt_embeds"],
            negative_prompt_embeds=a["negative_prompt_embeds"] if guided else None,
            pooled_prompt_embeds=a["pooled_prompt_embeds"],
            negative_pooled_prompt_embeds=a["negative_pooled_prompt_embeds"],
            prompt_attention_mask=a["prompt_attention_mask"],
            negative_prompt_attention_mask=a["negative_prompt_attention_mask"] if guided else None,
            max_sequence_length=check_limit(_longest(pipe), a["max_sequence_length"]),
            pictures=pictures, per_prompt=per_prompt, height=height, width=width, asked_size=asked,
            binned=bool(a["use_resolution_binning"]), steps=_steps(pipe, a), guided=guided,
            timesteps=a["timesteps"],
            sigmas=a["sigmas"],
            guidance_scale=scale, guidance_rescale=rescale, eta=number("eta", a["eta"]),
            random=random_source(a["generator"], pictures), latents=a["latents"], image=a["image"],
            mask_image=a["mask_image"], strength=strength, solver=_solver(pipe, a), table=table,
            output_type=a["output_type"], clip_skip=a["clip_skip"], prompt_weighting=bool(a["prompt_weighting"]),
            class_labels=_class_labels(pipe, a["class_labels"], pictures), loras=choices(pipe, a["loras"], pictures),
            original_size=pair("original_size", a["original_size"] or size),
            crops_coords_top_left=pair("crops_coords_top_left", a["crops_coords_top_left"]),
            target_size=pair("target_size", a["target_size"] or size),
            callback=a["callback_on_step_end"], progress=bool(a["progress"]),
            cache=check_cache(a["cache"], pipe.unet, table.network_times.tolist()),
            guidance=check_guidance(a["guidance"]), plan=plan, grid=a["grid"],
        )


def needs_uncond(plan: Plan) -> bool:
    return any(b.condition == UNCOND.condition for b in plan.branches)


def _config(pipe: Pipeline, key: str) -> Any:
    return getattr(pipe.unet.config, key, None)


def _mode(pipe: Pipeline, image: Any, mask: Any) -> str:
    channels, latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if mask is not None and image is None:
        raise LdmfastError("mask_image was given without image: inpainting needs both")
    mode = "text2img" if image is None else "img2img" if mask is None else "inpaint"
    if channels == 2 * latent + 1 and mode != "inpaint":
        raise LdmfastError(f"this is an inpainting network ({channels} input channels): give image and mask_image")
    if channels not in (latent, 2 * latent + 1):
        raise LdmfastError(f"the network takes {channels} input channels and the latents have {latent}: "
                           "this kind of conditioning is not supported")
    return mode


def grid_of(pipe: Pipeline, a: dict[str, Any]) -> TimeGrid | None:
    """The argument ``grid``, which nothing else may set the steps beside. Raises LdmfastError for times that the
    schedule does not have."""
    if a["grid"] is None:
        return None
    for name in ("num_inference_steps", "timesteps", "sigmas", "solver", "eta"):
        if a.get(name):
            raise LdmfastError(f"grid holds the steps and their solver, so {name}={a[name]!r} has no place: leave it "
                               "out")
    grid, latest = TimeGrid.of(a["grid"]), pipe.schedule.num_train_timesteps
    if not all(0 <= t <= latest for t in grid.network_times):
        raise LdmfastError(f"grid: network_times from {min(grid.network_times):g} to {max(grid.network_times):g} leave "
                           f"the schedule's 0 to {latest}")
    return grid


def _prompts(pipe: Pipeline, a: dict[str, Any], guided: bool) -> tuple[list[str] | None, list[str] | None, int]:
    """(prompts, negative prompts, number of prompts), each prompt with its negative one."""
    prompt, embeds = a["prompt"], a["prompt_embeds"]
    if not pipe.loaded.text_encoders and prompt is not None:
        raise LdmfastError("this checkpoint has no text encoder: give prompt_embeds, or no prompt at all "
                           "if the network is not conditioned on text")
    if prompt is not None and embeds is not None:
        raise LdmfastError("prompt and prompt_embeds were both given: give one of them")
    if isinstance(pipe.unet, DiT) and (embeds is not None or a["negative_prompt_embeds"] is not None):
        raise LdmfastError("the network is conditioned on classes and not on text: give class_labels alone")
    if embeds is None and a["negative_prompt_embeds"] is not None:
        raise LdmfastError("negative_prompt_embeds were given without prompt_embeds: give both, or negative_prompt")
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        if a[name] is not None and (embeds is None or not isinstance(pipe.unet, PixArt)):
            raise LdmfastError(f"{name} goes with the prompt_embeds of PixArt only: leave it out")
    t5 = prompt is not None and isinstance(pipe.loaded.text_encoders[0], T5Encoder)
    if a["prompt_weighting"] and (prompt is None or t5):
        raise LdmfastError("prompt_weighting=True needs a prompt for CLIP text encoders; " +
                           ("T5 takes the prompt as it is: leave it out" if t5 else "this call has no prompt"))
    if a["clip_skip"] is not None and t5:
        raise LdmfastError("clip_skip is for CLIP text encoders, this checkpoint has T5: leave it out")
    if prompt is None and embeds is None and isinstance(pipe.unet, DiT):
        return None, None, _pictures_of_labels(a)
    if prompt is None and embeds is None:
        if _config(pipe, "cross_attention_dim") is not None and pipe.loaded.text_encoders:
            raise LdmfastError("no prompt was given: give prompt (an empty text is allowed) or prompt_embeds")
        return None, None, 1
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        value = a[name]
        if value is not None and (not isinstance(value, torch.Tensor) or value.ndim != 3):
            raise ShapeError(f"{name} must be a (prompts, tokens, width) tensor")
        if value is not None and not bool(torch.isfinite(value).all()):
            raise LdmfastError(f"{name} holds NaN or infinite values: check how it was made")
    if embeds is not None:
        _check_masks(pipe, a, guided)
        negative = a["negative_prompt_embeds"]
        if guided and negative is None:
            raise LdmfastError("guidance needs negative_prompt_embeds beside prompt_embeds: give them, "
                               "or guidance_scale=1")
        if negative is not None and negative.shape != embeds.shape:
            raise ShapeError(f"negative_prompt_embeds {tuple(negative.shape)} and prompt_embeds "
                             f"{tuple(embeds.shape)} must have one shape")
        return None, None, embeds.shape[0]
    prompts = texts_of("prompt", prompt)
    negative = a["negative_prompt"]
    negatives = [""] if negative is None else texts_of("negative_prompt", negative)
    if len(negatives) == 1:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise ShapeError(f"{len(negatives)} negative prompts were given for {len(prompts)} prompts: give 1 or "
                         f"{len(prompts)}")
    if a["prompt_weighting"]:
        for text in prompts + negatives:
            weigh(text)  # raises for a weight that is no number
    return prompts, negatives, len(prompts)


def _pictures_of_labels(a: dict[str, Any]) -> int:
    """A picture for each class label, unless num_images_per_prompt says that there are more."""
    labels = a["class_labels"]
    several = a["num_images_per_prompt"] == 1 and labels is not None
    return max(1, _as_labels(labels).numel()) if several else 1


def _as_labels(labels: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LdmfastError(f"class_labels={labels!r} are not numbers: give the number of a class, or a list") from error


def _check_masks(pipe: Pipeline, a: dict[str, Any], guided: bool) -> None:
    """Of PixArt's prompt embeddings, which come with masks."""
    if not isinstance(pipe.unet, PixArt):
        return
    for name in ("prompt", "negative_prompt") if guided else ("prompt",):
        embeds, mask = a[f"{name}_embeds"], a[f"{name}_attention_mask"]
        if not isinstance(mask, torch.Tensor) or (embeds is not None and mask.shape != embeds.shape[:2]):
            raise ShapeError(f"{name}_embeds need {name}_attention_mask beside them, (prompts, tokens), 1 for "
                             "tokens of the prompt")


def _longest(pipe: Pipeline) -> int:
    """Tokens of a prompt by default: PixArt sigma's 300, alpha's 120."""
    return 300 if pipe.loaded.index.get("_class_name") == "PixArtSigmaPipeline" else 120


def _size(pipe: Pipeline, a: dict[str, Any], mode: str) -> tuple[int, int]:
    factor, multiple = pipe.vae_scale_factor, _multiple(pipe)
    sample = pipe.unet.config.sample_size
    if mode != "text2img":
        default_h, default_w = image_size(a["image"], multiple)
    elif a["latents"] is not None and isinstance(a["latents"], torch.Tensor) and a["latents"].ndim == 4:
        default_h, default_w = (int(s) * factor for s in a["latents"].shape[-2:])
    else:
        pair = sample if isinstance(sample, (list, tuple)) else (sample or 64, sample or 64)
        default_h, default_w = (int(s) * factor for s in pair)
    height = default_h if a["height"] is None else a["height"]
    width = default_w if a["width"] is None else a["width"]
    check_size(height, width, 1 if a["use_resolution_binning"] and isinstance(pipe.unet, PixArt) else multiple)
    return int(height), int(width)


def _multiple(pipe: Pipeline) -> int:
    """Pixels that height and width are multiples of."""
    return max(8, pipe.vae_scale_factor * (_config(pipe, "patch_size") or 1))


def _check_latents(pipe: Pipeline, latents: Any, pictures: int, height: int, width: int) -> None:
    if latents is None:
        return
    factor = pipe.vae_scale_factor
    wanted = (pictures, pipe.vae.config.latent_channels, height // factor, width // factor)
    if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != wanted:
        shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ShapeError(f"latents are {shape} where this call needs {wanted}")
    if latents.is_complex() or latents.is_meta or latents.layout != torch.strided:
        raise LdmfastError(f"latents are a {latents.dtype} tensor on {latents.device}, {latents.layout}: give real "
                           "numbers in memory")
    if not bool(torch.isfinite(latents).all()):
        raise LdmfastError("latents hold NaN or infinite values: check how they were made")


def _strength(value: Any, mode: str) -> float:
    if mode == "text2img":
        if value is not None:
            raise LdmfastError("strength was given without image: it says how much of a picture is redrawn")
        return 1.0
    strength = number("strength", (0.8 if mode == "img2img" else 1.0) if value is None else value)
    if not 0 <= strength <= 1:
        raise LdmfastError(f"strength={value} is not between 0 and 1")
    return strength


def _solver(pipe: Pipeline, a: dict[str, Any]) -> str:
    if a["grid"] is not None:
        return str(a["grid"].solver)
    usual = "flow_euler" if pipe.schedule.flow else "dpmpp_2m"
    return str(a["solver"] or pipe.loaded.defaults.get("solver", usual))


def _steps(pipe: Pipeline, a: dict[str, Any]) -> int:
    if a["grid"] is not None:
        return len(a["grid"].sigmas) - (not pipe.schedule.flow)
    if a["timesteps"] is not None or a["sigmas"] is not None:
        return len(a["timesteps"] if a["timesteps"] is not None else a["sigmas"])
    value = a["num_inference_steps"]
    if value is None:
        value = pipe.loaded.defaults.get("num_inference_steps", 50)
    return whole("num_inference_steps", value, 1)


def _table(pipe: Pipeline, a: dict[str, Any], strength: float) -> StepTable:
    if a["grid"] is not None:
        found: StepTable = a["grid"].table(pipe.schedule, strength=strength)
        return found
    explicit = a["timesteps"] is not None or a["sigmas"] is not None
    steps = None if explicit else _steps(pipe, a)
    eta = number("eta", a["eta"])
    solver = _solver(pipe, a)
    # diffusers' pipelines hand eta on to every scheduler that takes one; 0 is not each one's own default (TCD)
    options: dict[str, Any] = {"eta": eta} if eta or solver == "tcd" else {}
    return make_table(pipe.schedule, solver, steps, timesteps=a["timesteps"], sigmas=a["sigmas"],
                      strength=strength, **options)


def _class_labels(pipe: Pipeline, labels: Any, pictures: int) -> torch.Tensor | None:
    count = _config(pipe, "num_class_embeds") or _config(pipe, "num_embeds_ada_norm")
    if labels is None:
        if count is not None:
            raise LdmfastError(f"the network is class-conditional: give class_labels from 0 to {count - 1}")
        return None
    if count is None and _config(pipe, "class_embed_type") is None:
        raise LdmfastError("the network is not class-conditional: leave class_labels out")
    tensor = _as_labels(labels)
    if tensor.numel() == 1:
        tensor = tensor.expand(pictures)
    if tensor.numel() != pictures:
        raise ShapeError(f"{tensor.numel()} class_labels were given for {pictures} pictures: give 1 or {pictures}")
    if count is not None and (int(tensor.min()) < 0 or int(tensor.max()) >= count):
        raise LdmfastError(f"class_labels {labels} leave the range 0 to {count - 1}")
    return tensor


