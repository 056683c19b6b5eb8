"""One call, from checked request to pictures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .. import __version__, guidance
from ..caches import CacheReport, ParaStep, repeatable
from ..errors import LdmfastError, ShapeError
from ..models import DiT, PixArt
from ..ops._load import reused_memory
from ..samplers import StopSampling, sample
from ..torch_modes import ordinary, outside
from .aspect_ratio import fit
from .denoiser import Conditions, Denoiser, NanFinder, finite, guidance_embedding, not_finite
from .inputs import prepare_image, prepare_mask, repeat_to
from .lora import Cast, cast, fused_settings, settings_of
from .output import PipelineOutput, to_output
from .request import Request
from .t5_text import T5Encoder
from .text import PromptEmbeds, encode_prompts

if TYPE_CHECKING:
    from .pipeline import Pipeline

_TILE = 64  # latents a side, as in diffusers

Blend = Callable[[int, torch.Tensor], torch.Tensor]


class Call:
    """What a step callback is given in the pipeline's place: the pipeline's attributes, and this call's own state."""

    def __init__(self, pipe: Pipeline, request: Request) -> None:
        self._pipe = pipe
        self._interrupt = False
        self.num_timesteps = request.table.num_steps
        self.guidance_scale = request.guidance_scale
        self.table = request.table

    def cancel(self) -> None:
        """End this call after the current step; other calls of the pipeline go on."""
        self._interrupt = True

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


@contextmanager
def fits_memory(request: Request) -> Iterator[None]:
    """Raises ShapeError for a call that is too large for the memory."""
    try:
        with reused_memory():
            yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not re.search("allocate memory|overflow", str(error)):
            raise
        raise ShapeError(f"{request.pictures} pictures of {request.width}x{request.height} do not fit into memory: "
                         "ask for fewer or smaller ones, or call enable_vae_tiling()") from error


def run(pipe: Pipeline, request: Request) -> PipelineOutput:
    """Encode, sample, decode. A call too large for the memory raises ShapeError."""
    with fits_memory(request):
        return _run(pipe, request)


def _run(pipe: Pipeline, request: Request) -> PipelineOutput:
    states, casts = request.random.states(), cast(pipe, request)

    def prepare() -> tuple[Denoiser, torch.Tensor, Blend | None]:
        """The networks with their conditions, starting latents, and the blend of 4-channel inpainting."""
        conditions = _conditions(pipe, request, casts)
        x, blend, extra = _start(pipe, request)
        times = request.table.network_times.tolist()
        denoiser = Denoiser(casts, conditions, times, request.plan, one_by_one=pipe.one_by_one, extra=extra,
                            cache=request.cache)
        return denoiser, x, blend

    denoiser, start, blend = prepare()
    latents, cancelled = sample_latents(pipe, request, denoiser, start, blend)
    if not finite(latents):
        request.random.restore(states)
        part, networks = next(iter(pipe.components)), [("vae", pipe.vae)]
        for one in casts:
            networks += [(part, one.unet),
                         *((f"text_encoder{end}", e.model) for end, e in zip(("", "_2"), one.text_encoders))]
        explain_not_finite(pipe, request, networks, prepare)
    if request.output_type == "latent":
        images: Any = ordinary(latents)
    else:
        images = to_output(fit(decode(pipe, latents), *request.asked_size), request.output_type)
    return PipelineOutput(images, _settings(pipe, request), cancelled, report=CacheReport.of(denoiser.sessions))


def _embeds(pipe: Pipeline, request: Request, casts: Sequence[Cast]) -> dict[str, PromptEmbeds] | None:
    """Embeddings by the names of the branches' conditions, one row a picture; None without a prompt."""
    if request.prompt_embeds is not None:
        found = {"cond": PromptEmbeds(request.prompt_embeds, request.pooled_prompt_embeds,
                                      request.prompt_attention_mask).repeat(request.per_prompt)}
        if request.negative_prompt_embeds is not None:
            found["uncond"] = PromptEmbeds(request.negative_prompt_embeds, request.negative_pooled_prompt_embeds,
                                           request.negative_prompt_attention_mask).repeat(request.per_prompt)
        return found
    if request.prompts is None:
        return None
    encoded = [_encoded(pipe, request, c) for c in casts]
    if len(encoded) == 1:
        return encoded[0]
    back = torch.tensor([i for c in casts for i in c.pictures]).argsort()
    return {name: PromptEmbeds.cat([e[name] for e in encoded])[back] for name in encoded[0]}


def _encoded(pipe: Pipeline, request: Request, one: Cast) -> dict[str, PromptEmbeds]:
    """The rows of the pictures that one set of networks draws."""
    assert request.prompts is not None
    encoders, count = one.text_encoders, len(one.pictures)
    given = {"cond": request.prompts, "uncond": request.negative_prompts}
    columns = {name: [column[i // request.per_prompt] for i in one.pictures]
               for name, column in given.items() if column is not None}
    force_zeros = (request.negative_prompts is not None and not any(request.negative_prompts) and len(encoders) == 2
                   and pipe.loaded.index.get("force_zeros_for_empty_prompt", True))
    if force_zeros:
        del columns["uncond"]
    columns |= {guidance.EXTRA + text: [text] * count for text in request.plan.texts}
    texts = [text for column in columns.values() for text in column]
    if isinstance(encoders[0], T5Encoder):
        embeds = encoders[0].encode(texts, request.max_sequence_length)
    else:
        embeds = encode_prompts(encoders, texts, clip_skip=request.clip_skip, one_by_one=pipe.one_by_one,
                                weighting=request.prompt_weighting)
    found = {name: embeds[i * count:(i + 1) * count] for i, name in enumerate(columns)}
    return found | ({"uncond": found["cond"].zeros_like()} if force_zeros else {})


def _conditions(pipe: Pipeline, request: Request, casts: Sequence[Cast]) -> dict[str, Conditions]:
    """By the names that branches of guidance give them: "cond", and "uncond" where it is needed."""
    embeds = _embeds(pipe, request, casts)
    config, device, n = pipe.unet.config, pipe.device, request.pictures
    dtype = next(pipe.unet.parameters()).dtype
    labels = None if request.class_labels is None else request.class_labels.to(device)
    dim = getattr(config, "time_cond_proj_dim", None)
    told = None if dim is None else guidance_embedding(request.guidance_scale, n, dim).to(device, dtype)
    if embeds is None and isinstance(pipe.unet, DiT) and labels is not None:
        none = torch.full_like(labels, config.num_embeds_ada_norm)
        return {"uncond": Conditions(class_labels=none), "cond": Conditions(class_labels=labels)}
    if embeds is None:
        return {"cond": Conditions(class_labels=labels, timestep_cond=told)}
    time_ids = None
    if getattr(config, "addition_embed_type", None) == "text_time":
        ids = (*request.original_size, *request.crops_coords_top_left, *request.target_size)
        time_ids = torch.tensor([ids], dtype=dtype, device=device).expand(n, -1)
    resolution = ratio = None
    if isinstance(pipe.unet, PixArt) and config.micro:
        sizes = torch.tensor([request.height, request.width], dtype=dtype, device=device)
        resolution = sizes.expand(n, -1)
        ratio = torch.tensor([request.height / request.width], dtype=dtype, device=device).expand(n, -1)
    found = {}
    for name, rows in embeds.items():
        pooled = None if rows.pooled is None else rows.pooled.to(device, dtype)
        if time_ids is not None and pooled is None:
            raise LdmfastError("this network also needs pooled_prompt_embeds and negative_pooled_prompt_embeds")
        found[name] = Conditions(rows.states.to(device, dtype), pooled if time_ids is not None else None,
                                 time_ids, labels, told, None if rows.mask is None else rows.mask.to(device),
                                 resolution, ratio, None if rows.tokens is None else rows.tokens.to(device))
    return found


def _start(pipe: Pipeline, request: Request) -> tuple[torch.Tensor, Blend | None, torch.Tensor | None]:
    """Starting latents (fp32), the per-step blend of 4-channel inpainting, extra channels of 9-channel inpainting.

    Random numbers are drawn in diffusers' order: the picture's posterior, the noise, the masked picture's posterior.
    """
    table, factor, n = request.table, pipe.vae_scale_factor, request.pictures
    channels = pipe.vae.config.latent_channels
    shape = (n, channels, request.height // factor, request.width // factor)
    concat = pipe.unet.config.in_channels != channels
    needs_source = request.mode == "img2img" or (request.mode == "inpaint" and (not concat or request.strength < 1))
    pixels = source = None
    if request.mode != "text2img":
        pixels = repeat_to(prepare_image(request.image, request.height, request.width), n, "pictures")
    if needs_source and pixels is not None:
        source = encode(pipe, pixels, request)
    given = request.latents
    noise = given.float().to(pipe.device) if given is not None else request.random.normal(shape).to(pipe.device)
    if source is None or (request.mode == "inpaint" and request.strength == 1):
        x = noise * table.init_noise_sigma
    else:
        x = table.add_noise(source, noise, 0)
    if request.mode != "inpaint" or pixels is None:
        return x, None, None
    mask = repeat_to(prepare_mask(request.mask_image, request.height, request.width), n, "masks")
    small = torch.nn.functional.interpolate(mask, size=shape[-2:]).to(pipe.device)
    if concat:
        masked = encode(pipe, pixels * (mask < 0.5), request)
        return x, None, torch.cat([small, masked], dim=1)
    if given is None:
        request.random.normal(shape)  # the posterior diffusers draws here and does not use: keeps streams equal
    return x, _blend(request, small, source, noise), None


def _blend(request: Request, mask: torch.Tensor, source: torch.Tensor | None, noise: torch.Tensor) -> Blend:
    table = request.table

    def blend(step: int, x: torch.Tensor) -> torch.Tensor:
        assert source is not None
        last = step + 1 >= table.num_steps
        known = source if last else table.add_noise(source, noise, step + 1)
        return torch.where(mask.bool(), x, known.to(x.dtype))

    return blend


def sample_latents(pipe: Pipeline, request: Request, denoiser: Denoiser, x: torch.Tensor, blend: Blend | None
            ) -> tuple[torch.Tensor, bool]:
    from ..progress import Bar

    call = Call(pipe, request)
    with Bar(total=call.num_timesteps, disable=not request.progress, unit="step") as bar:

        def on_step(step: int, t: float, latents: torch.Tensor) -> torch.Tensor:
            if blend is not None:
                latents = blend(step, latents)
            bar.update()
            if request.callback is not None:
                latents = _user_callback(request, call, step, t, latents)
            return latents

        def stop_if_cancelled() -> None:
            if call.interrupt:
                raise StopSampling

        def unless_cancelled(x_in: torch.Tensor, t: float, stage: int) -> Any:
            stop_if_cancelled()
            return denoiser(x_in, t, stage)

        table, generator, out = request.table, request.random.argument, None
        parallel = next((p for p in request.cache if isinstance(p, ParaStep)), None)
        if parallel is not None:
            if pipe.engine is not None:
                pipe.engine.tell("ParaStep takes the steps in an order of its own")
            out = parallel.sample(unless_cancelled, x, table=table, generator=generator, callback=on_step,
                                  before_stage=stop_if_cancelled)
        elif pipe.engine is not None:
            out = pipe.engine.sample(denoiser, x, table=table, generator=generator, callback=on_step,
                                     before_stage=stop_if_cancelled)
        if out is None:
            out = sample(unless_cancelled, x, table=table, generator=generator, callback=on_step)
    return out, call.interrupt


def _user_callback(request: Request, call: Call, step: int, t: float, latents: torch.Tensor) -> torch.Tensor:
    assert request.callback is not None
    given = ordinary(latents)  # what the callback changes in place counts, too
    answer = outside(request.callback, call, step, t, {"latents": given})
    if answer is None:
        return given
    if not isinstance(answer, dict) or not isinstance(answer.get("latents", given), torch.Tensor):
        raise LdmfastError("callback_on_step_end must return None or a dict like {'latents': tensor}")
    replaced = answer.get("latents", given)
    if replaced.shape != latents.shape:
        raise LdmfastError(f"callback_on_step_end returned latents {tuple(replaced.shape)} "
                           f"where {tuple(latents.shape)} are needed")
    return replaced.detach().to(latents)


def explain_not_finite(pipe: Pipeline, request: Request, networks: Sequence[tuple[str, torch.nn.Module]],
                       prepare: Callable[[], tuple[Denoiser, torch.Tensor, Blend | None]]) -> None:
    """Run the call again from the same random state, looking at every step, and raise what was found.

    prepare: the denoiser with its conditions, starting latents, and the blend of 4-channel inpainting."""
    steps = request.table.num_steps
    done = 0

    def on_step(step: int, t: float, latents: torch.Tensor) -> torch.Tensor:
        nonlocal done
        if blend is not None:
            latents = blend(step, latents)
        if request.callback is not None:
            latents = _user_callback(request, Call(pipe, request), step, t, latents)
        done = step + 1
        if not bool(torch.isfinite(latents).all()):
            raise not_finite(f"at step {step + 1} of {steps} (timestep {t:g})", finder.found, pipe.precision)
        return latents

    with NanFinder(networks) as finder:
        denoiser, x, blend = prepare()
        if finder.found is not None:
            raise not_finite("before the first step", finder.found, pipe.precision)
        sample(denoiser, x, table=request.table, generator=request.random.argument, callback=on_step)
    raise not_finite(f"after step {done} of {steps}", finder.found, pipe.precision)


def _tile(pipe: Pipeline) -> int | None:
    return _TILE if pipe.vae_tiling else None


def encode(pipe: Pipeline, pixels: torch.Tensor, request: Request) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1] to scaled latents: a sample of the posterior if there is one, one picture at a time."""
    vae = pipe.vae
    dtype = next(vae.parameters()).dtype
    codes = [vae.encode(row.to(pipe.device, dtype), tile=_tile(pipe)) for row in pixels.split(1)]
    if isinstance(codes[0], torch.Tensor):  # AutoencoderTiny, VQModel: no posterior, nothing is drawn
        sampled = torch.cat(codes).float()
    else:
        mean = torch.cat([c.mean.float() for c in codes])
        deviation = torch.cat([torch.exp(0.5 * c.logvar.float()) for c in codes])
        sampled = mean + deviation * request.random.normal(mean.shape).to(mean.device)
    return (sampled - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def decode(pipe: Pipeline, latents: torch.Tensor) -> torch.Tensor:
    """Scaled latents to (N, 3, H, W) pixels in about [-1, 1], one picture at a time: bounded memory, and no
    picture depends on its neighbours. Raises PrecisionError when the decoder makes NaN."""
    vae = pipe.vae
    dtype = next(vae.parameters()).dtype
    z = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    pixels = torch.cat([_decode_one(pipe, row.to(dtype)).float() for row in z.split(1)])
    if not finite(pixels):
        with NanFinder([("vae", vae)]) as finder:
            for row in z.split(1):
                vae.decode(row.to(dtype), tile=_tile(pipe))
        raise not_finite("in the VAE's decoder", finder.found, pipe.precision)
    return pixels


def _decode_one(pipe: Pipeline, z: torch.Tensor) -> torch.Tensor:
    tile = _tile(pipe)
    decode = partial(pipe.vae.decode, tile=tile)
    pixels = None if pipe.engine is None else pipe.engine.call(pipe.vae, ("decode", tile), decode, z)
    return decode(z) if pixels is None else pixels


def digest(image: Any) -> str | None:
    """A short hash of a source picture or mask, to tell on repeating whether it is the same one."""
    if image is None:
        return None
    items = image if isinstance(image, (list, tuple)) else [image]
    h = hashlib.sha256()
    for item in items:
        array = np.asarray(item.convert("RGBA")) if isinstance(item, Image.Image) else np.asarray(item)
        h.update(str((array.shape, array.dtype)).encode() + np.ascontiguousarray(array).tobytes())
    return h.hexdigest()[:16]


def _settings(pipe: Pipeline, request: Request) -> list[dict[str, Any]]:
    """For each picture, all that is needed to make it again. ``seed`` is None where no number tells it."""
    common: dict[str, Any] = {
        "ldmfast": __version__, "torch": torch.__version__, "model": pipe.source,
        "fingerprint": pipe.loaded.fingerprint, "precision": pipe.precision, "device": pipe.device.type,
        "mode": request.mode, "height": request.asked_size[0], "width": request.asked_size[1],
        "use_resolution_binning": request.binned, "max_sequence_length": request.max_sequence_length,
        "num_inference_steps": request.steps, "timesteps": request.timesteps, "sigmas": request.sigmas,
        "guidance_scale": request.guidance_scale, "guidance_rescale": request.guidance_rescale, "eta": request.eta,
        "solver": request.solver, "clip_skip": request.clip_skip, "prompt_weighting": request.prompt_weighting,
        "strength": request.strength,
        "original_size": list(request.original_size), "target_size": list(request.target_size),
        "crops_coords_top_left": list(request.crops_coords_top_left),
        "image": digest(request.image), "mask_image": digest(request.mask_image),
        "repeatable": (request.prompt_embeds is None and request.latents is None and request.callback is None
                       and repeatable(request.cache) and guidance.repeatable(request.guidance)),
        "cache": [p.to_dict() for p in request.cache],
        "guidance": [g.to_dict() for g in request.guidance],
        "grid": None if request.grid is None else request.grid.to_dict(),
        "vae_tiling": pipe.vae_tiling, "fused_loras": fused_settings(pipe),
    }
    rows = []
    for i in range(request.pictures):
        p = i // request.per_prompt
        rows.append({
            "prompt": None if request.prompts is None else request.prompts[p],
            "negative_prompt": None if request.negative_prompts is None else request.negative_prompts[p],
            "seed": request.random.seeds[i],
            "class_label": None if request.class_labels is None else int(request.class_labels[i]),
            "loras": settings_of(pipe, request.loras[i]),
        })
    batch = rows if pipe.precision != "exact" and len(rows) > 1 else None
    return [{**common, **row, "batch": batch, "index": i} for i, row in enumerate(rows)]
