"""What the pipelines of SD 3 and FLUX share: a call from checked request to pictures, around a joint transformer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from .. import __version__
from ..caches import CacheReport, Policy, check_cache, from_settings, repeatable
from ..errors import LdmfastError, ShapeError
from ..guidance import EXTRA, Branch, Guidance, Plan, check_guidance
from ..guidance import Call as Steps
from ..guidance import from_settings as guidance_from
from ..guidance import repeatable as all_plain
from ..guidance.settle import check_suits, settle
from ..samplers import StepTable
from ..torch_modes import ordinary, own_modes
from .guided import Guided
from .inputs import RandomSource, check_callback, check_lists, check_size, number, random_source, texts_of, whole
from .lora import active, check_active, fused_settings, settings_of
from .output import PipelineOutput, to_output
from .pipeline import Pipeline
from .repeat import check_settings
from .request import OUTPUT_TYPES, needs_uncond
from .run import decode, explain_not_finite, fits_memory, sample_latents
from .t5_text import T5Encoder, check_limit
from .text import PromptEmbeds, TextEncoder

_LONGEST = 512  # tokens of a T5 prompt, diffusers' limit


@dataclass(frozen=True)
class JointRequest:
    """One call, complete. texts: for each text encoder one text a prompt. embeds: given in their place. table: all step
    coefficients, guidance folded in. arguments: of the call, as ``settings`` keep them. pixels: pictures that condition
    the network, (pictures, C, H, W)."""

    texts: tuple[list[str], ...] | None
    negative_texts: tuple[list[str], ...] | None
    embeds: PromptEmbeds | None
    negative_embeds: PromptEmbeds | None
    pictures: int
    per_prompt: int
    height: int
    width: int
    guidance_scale: float
    table: StepTable
    random: RandomSource
    latents: Tensor | None
    output_type: str
    clip_skip: int | None
    max_sequence_length: int
    callback: Callable[..., Any] | None
    progress: bool
    plan: Plan
    guidance: tuple[Guidance, ...] = ()
    cache: tuple[Policy, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    pixels: dict[str, Tensor] = field(default_factory=dict)


class JointPipeline(Pipeline):
    """A pipeline around SD3Transformer2D or FluxTransformer2D. Text to image."""

    takes_pictures = False
    prompts: ClassVar[tuple[str, ...]]  # diffusers' argument for each text encoder
    # arguments that settings keep
    kept: ClassVar[tuple[str, ...]] = ("num_inference_steps", "sigmas", "guidance_scale", "max_sequence_length",
                                       "solver", "mu", "grid")

    @property
    def clip_encoders(self) -> list[TextEncoder]:
        return [e for e in self.loaded.text_encoders if isinstance(e, TextEncoder)]

    @property
    def t5_encoder(self) -> T5Encoder | None:
        return next((e for e in self.loaded.text_encoders if isinstance(e, T5Encoder)), None)

    @property
    def multiple(self) -> int:
        """Pixels that height and width are multiples of."""
        return 2 * self.vae_scale_factor

    @property
    @abstractmethod
    def default_size(self) -> int:
        """Pixels a side where a call says nothing."""

    @abstractmethod
    def latents_shape(self, pictures: int, height: int, width: int) -> tuple[int, ...]:
        """Of the state that is sampled."""

    @abstractmethod
    def encode(self, texts: Sequence[list[str]], length: int, clip_skip: int | None) -> PromptEmbeds:
        """Texts for each encoder -> one row a prompt."""

    def pack(self, noise: Tensor) -> Tensor:
        """(N, C, h, w) -> the state that is sampled."""
        return noise

    def noise(self, request: JointRequest) -> Tensor:
        """The state at the start."""
        if request.latents is not None:
            return request.latents.float()
        f = self.vae_scale_factor
        return self.pack(request.random.normal((request.pictures, self.vae.config.latent_channels, request.height // f,
                                                request.width // f)))

    def start(self, request: JointRequest) -> tuple[Tensor, Tensor | None]:
        """The state at the start, and what the network is given beside it in the last dimension, if anything."""
        return self.noise(request), None

    def unpack(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Inverse of pack; height and width in pixels."""
        return latents

    def network_time(self, t: float) -> float:
        """What the network is told for the scheduler's time."""
        return t

    def conditions(self, request: JointRequest, rows: int, tokens: int) -> dict[str, Any]:
        """More arguments of the network's prepare(), for that many rows and text tokens."""
        return {}

    def resolve(self, a: dict[str, Any], scale: float, implied: bool, table: Callable[[int, int], StepTable],
                more: Sequence[Guidance] = ()) -> JointRequest:
        """Checks what the families have in common. scale: of classifier-free guidance, which there is if it is implied
        or asked for. table: of a size in pixels. more: guidance that other arguments say."""
        if a["output_type"] not in OUTPUT_TYPES:
            raise LdmfastError(f"output_type={a['output_type']!r} is unknown: use one of {', '.join(OUTPUT_TYPES)}")
        check_callback(a["callback_on_step_end"], a["callback_on_step_end_tensor_inputs"])
        check_lists(a)
        if a.get("clip_skip") is not None:
            whole("clip_skip", a["clip_skip"], 0)
        per_prompt = whole("num_images_per_prompt", a["num_images_per_prompt"], 1)
        texts, embeds, count = self._prompts(a)
        height, width = (self.default_size if a[k] is None else a[k] for k in ("height", "width"))
        check_size(height, width, self.multiple)
        guidance = (*settle(a["guidance"], scale, implied), *more)
        check_suits(self.unet, guidance, True, False)
        plan = Plan.of(guidance, Steps.of(self.schedule, table(int(height), int(width)), scale))
        negative_texts = negative_embeds = None
        if plan.texts and texts is None:
            raise LdmfastError(f"a guidance has a prompt of its own, {plan.texts[0]!r}: give the call a prompt, too, "
                               "and not prompt_embeds")
        if needs_uncond(plan):
            negative_texts, negative_embeds = self._negatives(a, count, embeds)
        shape, latents = self.latents_shape(count * per_prompt, height, width), a["latents"]
        if latents is not None and (not isinstance(latents, Tensor) or tuple(latents.shape) != shape):
            found = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ShapeError(f"latents are {found} where this call needs {shape}")
        if latents is not None and not bool(torch.isfinite(latents).all()):
            raise LdmfastError("latents hold NaN or infinite values: check how they were made")
        length = check_limit(_LONGEST, a["max_sequence_length"])
        if length > _LONGEST:
            raise LdmfastError(f"max_sequence_length={length} is more than {_LONGEST}")
        steps = plan.table()
        kept = {k: a[k] for k in self.kept if a.get(k) is not None}
        return JointRequest(
            texts, negative_texts, embeds, negative_embeds, count * per_prompt, per_prompt, int(height), int(width),
            scale, steps, random_source(a["generator"], count * per_prompt), latents, a["output_type"],
            a.get("clip_skip"), length, a["callback_on_step_end"], bool(a["progress"]), plan,
            check_guidance(a["guidance"]), check_cache(a["cache"], self.unet, steps.network_times.tolist()),
            {**kept, "height": int(height), "width": int(width)})


    def _prompts(self, a: dict[str, Any]) -> tuple[tuple[list[str], ...] | None, PromptEmbeds | None, int]:
        embeds = _given(a, "")
        if (a["prompt"] is None) == (embeds is None):
            raise LdmfastError("give prompt or prompt_embeds, and not both" if embeds is not None else
                               "no prompt was given: give prompt (an empty text is allowed) or prompt_embeds")
        if embeds is not None:
            return None, embeds, len(embeds.states)
        if not self.clip_encoders:
            raise LdmfastError("this checkpoint has no text encoders: give prompt_embeds and pooled_prompt_embeds")
        first = texts_of("prompt", a["prompt"])
        texts = tuple(first if not a[name] else texts_of(name, a[name]) for name in self.prompts)
        for name, column in zip(self.prompts, texts):
            if len(column) != len(first):
                raise ShapeError(f"{name} has {len(column)} texts, prompt has {len(first)}; they must agree")
        return texts, None, len(first)

    def _negatives(self, a: dict[str, Any], count: int, embeds: PromptEmbeds | None,
                   ) -> tuple[tuple[list[str], ...] | None, PromptEmbeds | None]:
        given = _given(a, "negative_")
        if given is not None:
            if embeds is not None and given.states.shape != embeds.states.shape:
                raise ShapeError(f"negative_prompt_embeds {tuple(given.states.shape)} and prompt_embeds "
                                 f"{tuple(embeds.states.shape)} must have one shape")
            if len(given.states) != count:
                raise ShapeError(f"negative_prompt_embeds have {len(given.states)} prompts, this call has {count}; "
                                 "they must agree")
            return None, given
        if not self.clip_encoders:
            raise LdmfastError("guidance needs negative_prompt_embeds and negative_pooled_prompt_embeds beside "
                               "prompt_embeds: give them, or guidance_scale=1")
        first = texts_of("negative_prompt", a["negative_prompt"] or "")
        columns = [first if not a[f"negative_{name}"] else texts_of(f"negative_{name}", a[f"negative_{name}"])
                   for name in self.prompts]
        columns = [c * count if len(c) == 1 else c for c in columns]
        if any(len(c) != count for c in columns):
            raise ShapeError(f"{max(map(len, columns))} negative prompts were given for {count} prompts: give 1 or "
                             f"{count}")
        return tuple(columns), None

    def run(self, request: JointRequest) -> PipelineOutput:
        """Encode, sample, decode."""
        with own_modes(torch.inference_mode), fits_memory(cast(Any, request)):
            conditions = self._conditions(request)
            x, beside = self.start(request)
            x, states = x.to(self.device), request.random.states()
            loop: Any = request
            denoiser: Any = JointDenoiser(self, request, conditions, beside)
            latents, cancelled = sample_latents(self, loop, denoiser, x, None)
            if not bool(torch.isfinite(latents).all()):
                request.random.restore(states)
                encoders = zip(("", "_2", "_3"), self.loaded.text_encoders)
                networks = [("vae", self.vae), ("transformer", self.unet),
                            *((f"text_encoder{end}", e.model) for end, e in encoders)]

                def again() -> Any:
                    return JointDenoiser(self, request, self._conditions(request), beside), x, None

                explain_not_finite(self, loop, networks, again)
            images: Any = ordinary(latents)
            if request.output_type != "latent":
                latents = self.unpack(latents, request.height, request.width)
                images = to_output(decode(self, latents), request.output_type)
        return PipelineOutput(images, self._settings(request), cancelled, report=CacheReport.of(denoiser.sessions))

    def _conditions(self, request: JointRequest) -> dict[str, PromptEmbeds]:
        """By the names that branches of guidance give them, one row a picture."""
        found = {}
        for name, texts, embeds, clip_skip in (("uncond", request.negative_texts, request.negative_embeds, None),
                                               ("cond", request.texts, request.embeds, request.clip_skip)):
            if texts is not None:
                embeds = self.encode(texts, request.max_sequence_length, clip_skip)
            if embeds is not None:
                found[name] = embeds.repeat(request.per_prompt)
        for text in request.plan.texts:
            column = [text] * (request.pictures // request.per_prompt)
            embeds = self.encode([column] * len(self.prompts), request.max_sequence_length, request.clip_skip)
            found[EXTRA + text] = embeds.repeat(request.per_prompt)
        shapes = [(tuple(f.states.shape), None if f.pooled is None else tuple(f.pooled.shape)) for f in found.values()]
        if len(set(shapes)) > 1:
            raise ShapeError(f"the negative prompt's embeddings are {shapes[0]}, the prompt's {shapes[1]}: give both "
                             "as embeddings of one shape, or both as texts")
        return found

    def _settings(self, request: JointRequest) -> list[dict[str, Any]]:
        steps = request.table.num_steps
        common: dict[str, Any] = {
            "ldmfast": __version__, "torch": torch.__version__, "model": self.source,
            "fingerprint": self.loaded.fingerprint, "precision": self.precision, "device": self.device.type,
            "vae_tiling": self.vae_tiling, "fused_loras": fused_settings(self),
            "loras": settings_of(self, active(self)),
            "mode": "text2img", "height": request.height, "width": request.width, "num_inference_steps": steps,
            "solver": request.table.solver, "clip_skip": request.clip_skip, "guidance_scale": request.guidance_scale,
            "timesteps": None, "sigmas": None, "guidance_rescale": 0.0, "eta": 0.0, "image": None, "mask_image": None,
            "repeatable": (request.texts is not None and request.negative_embeds is None
                           and request.latents is None and request.callback is None and not request.pixels
                           and repeatable(request.cache) and all_plain(request.guidance)),
            "cache": [p.to_dict() for p in request.cache],
            "guidance": [g.to_dict() for g in request.guidance],
            **request.arguments, "arguments": request.arguments}
        rows = []
        for i in range(request.pictures):
            p = i // request.per_prompt
            own: dict[str, Any] = {
                "prompt": None if request.texts is None else request.texts[0][p],
                "negative_prompt": None if request.negative_texts is None else request.negative_texts[0][p],
                "seed": request.random.seeds[i], "texts": {}}
            for prefix, columns in (("", request.texts), ("negative_", request.negative_texts)):
                own["texts"] |= {prefix + n: c[p] for n, c in zip(self.prompts, columns or ())}
            rows.append(own)
        batch = rows if self.precision != "exact" and len(rows) > 1 else None
        return [{**common, **row, "batch": batch, "index": i} for i, row in enumerate(rows)]

    def repeat(self, settings: dict[str, Any], *, image: Any = None, mask_image: Any = None,
               progress: bool = True) -> PipelineOutput:
        """As Pipeline.repeat."""
        check_settings(self, settings, image, mask_image)
        check_active(self, settings)
        if not {"arguments", "texts"} <= settings.keys():
            raise LdmfastError("the settings lack 'arguments' or 'texts': they were not written by this pipeline")
        rows = settings.get("batch") or [settings]
        texts = {name: [row["texts"][name] for row in rows] for name in rows[0]["texts"]}
        call: Any = self  # the families' arguments are not Pipeline's
        out = call(**settings["arguments"], **texts, generator=[row["seed"] for row in rows], progress=progress,
                   cache=from_settings(settings.get("cache")),
                   guidance=guidance_from(settings.get("guidance")))
        assert isinstance(out, PipelineOutput)
        index = settings.get("index", 0) if settings.get("batch") else 0
        return PipelineOutput([out.images[index]], [out.settings[index]], out.cancelled, report=out.report)


def _given(a: dict[str, Any], prefix: str) -> PromptEmbeds | None:
    names = [f"{prefix}prompt_embeds", f"{prefix}pooled_prompt_embeds"]
    states, pooled = (a[n] for n in names)
    if states is None and pooled is None:
        return None
    for name, value, dims in zip(names, (states, pooled), (3, 2)):
        if not isinstance(value, Tensor) or value.ndim != dims:
            raise ShapeError(f"{name} must be a tensor (prompts, {'tokens, ' * (dims - 2)}width); {names[0]} and "
                             f"{names[1]} go together")
        if not bool(torch.isfinite(value).all()):
            raise LdmfastError(f"{name} holds NaN or infinite values: check how it was made")
    if len(states) != len(pooled):
        raise ShapeError(f"{names[0]} has {len(states)} prompts, {names[1]} {len(pooled)}; they must agree")
    return PromptEmbeds(states, pooled)


class JointDenoiser(Guided):
    """Callable (x, t, stage) -> prediction, or one for each of the table's predictions.

    In exact precision every picture has forwards of its own, its guidance branches together."""

    casts = 1

    def __init__(self, pipe: JointPipeline, request: JointRequest, conditions: Mapping[str, PromptEmbeds],
                 beside: Tensor | None = None) -> None:
        self.pipe, self.request, self.extra = pipe, request, beside
        self.unet, self.dtype = pipe.unet, pipe.unet.dtype
        n = request.pictures
        groups = [slice(i, i + 1) for i in range(n)] if pipe.one_by_one else [slice(0, n)]

        def prepare(net: Any, names: Sequence[str], group: int, times: list[float]) -> Any:
            rows = [conditions[name][groups[group]] for name in names]
            states = torch.cat([r.states for r in rows]).to(pipe.device, net.dtype)
            pooled = torch.cat([r.pooled for r in rows if r.pooled is not None]).to(pipe.device, net.dtype)
            more = pipe.conditions(request, len(states), states.shape[1])
            return net.prepare(times, states, pooled_projections=pooled, **more)

        times = [self.network_time(float(t)) for t in request.table.network_times]
        super().__init__(request.plan, [pipe.unet] * len(groups), groups, times, prepare, request.cache)

    def __call__(self, x: Tensor, t: float, stage: int) -> Any:
        return self.evaluate(x, self.shown(x, self.extra), self.network_time(float(t)), stage)

    def network_time(self, t: float) -> float:
        return self.pipe.network_time(t)

    def row(self, t: float, stage: int) -> int:
        """The number of a timestep in the states of its forward, where there is one."""
        return int(self.forwards[stage][0].states[0].numbers[self.network_time(float(t))])

    def shown(self, x: Tensor, extra: Tensor | None) -> Tensor:
        return x if extra is None else torch.cat([x, extra.to(x)], dim=-1)

    def predict(self, x: Tensor, extra: Tensor | None, branches: Sequence[Branch],
                networks: Sequence[Callable[[Tensor], Tensor]]) -> Any:
        """Of a steady plan, and its forward of these branches. networks: that of each group of pictures, its time
        and conditions filled in."""
        outs = self.batch(self.shown(x, extra), len(branches), networks)
        return self.plan.outputs(dict(zip(branches, outs)), 0, x, {})


def number_of_steps(pipe: Pipeline, a: dict[str, Any]) -> int:
    """Steps of a call that gives no sigmas."""
    value = a["num_inference_steps"]
    value = pipe.loaded.defaults.get("num_inference_steps", 28) if value is None else value
    return whole("num_inference_steps", value, 1)


def scale_of(pipe: Pipeline, a: dict[str, Any], default: float) -> float:
    value = a["guidance_scale"]
    return number("guidance_scale", pipe.loaded.defaults.get("guidance_scale", default) if value is None else value)
