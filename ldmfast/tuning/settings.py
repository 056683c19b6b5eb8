"""Settings of a faster call, what they promise, and the file that keeps them beside a model."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__, guidance
from ..caches import CacheReport, Policy, check_cache, from_settings, repeatable
from ..errors import LdmfastError
from ..guidance import Guidance, check_guidance
from ..pipelines.load import ASSETS, PRECISIONS
from ..pipelines.lora import fused_settings, settings_of
from ..pipelines.output import replacing

if TYPE_CHECKING:
    from ..pipelines import Pipeline

NAME = "ldmfast_settings.json"
UNITS = {"psnr": "dB", "latent_error": ""}


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What ``tune`` found on held-out pictures, for calls with the arguments that theirs had.

    measure: "psnr" (dB, from the reference picture of the same seed) or "latent_error" (of the last latents, relative).
    limit: what was asked of its mean. bound: the 95% bound (``bounds.mean_bound``) for the mean of ``new`` unseen
    pictures, which meets limit. mean, worst: of the ``held_out`` pictures. share: of these, how many meet limit on
    their own; share_bound: a lower 95% bound for that share (Clopper-Pearson). one: what one unseen picture meets with
    95% (conformal; None with fewer than 20 finalists - 1 held-out pictures). finalists: settings among which the
    fastest that passed was taken, by the same held-out pictures; share_bound and one are corrected for it, each made
    at 1 - 5% / finalists (Bonferroni). speedup: over the reference, median of the held-out turns, and of the fastest:
    not corrected, so it is on average a little more than new pictures would show. made: the arguments of the measured
    calls, as a PNG keeps them (``conditions``).
    """

    measure: str
    limit: float
    bound: float
    mean: float
    worst: float
    held_out: int
    new: int
    confidence: float
    share: float
    share_bound: float
    one: float | None
    finalists: int
    speedup: float
    made: Mapping[str, Any]

    def __str__(self) -> str:
        unit, sign, least = UNITS[self.measure], ">=" if self.measure == "psnr" else "<=", self.measure == "psnr"
        digits = 1 if least else 4

        def show(value: float) -> str:
            return f"{value:.{digits}f}{' ' if unit else ''}{unit}"

        name = self.measure.replace("_", " ").replace("psnr", "PSNR")
        return (f"mean {name} {sign} {show(self.limit)} over {self.new} unseen pictures ({self.confidence:.0%} bound "
                f"{show(self.bound)}; {self.held_out} held-out ones had {show(self.mean)}, the worst "
                f"{show(self.worst)}; {self.share:.0%} met it on their own, of all at least {self.share_bound:.0%}"
                + (f", corrected for {self.finalists} settings tested)" if self.finalists > 1 else ")"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A way to draw: ``pipe(prompt, settings=...)``. None leaves the model's own default.

    precision: as of ``Pipeline.from_pretrained``; the pipeline opens itself again in it where it is another. solver,
    steps, timesteps, guidance_scale, loras: arguments of the call. guidance: of ldmfast.guidance, one or several (an
    interval of guidance is CFG(start=, stop=)). cache: policies of ldmfast.caches. promise: what tune measured for
    them; model, version, device: where it did. notes: what else tune has to say.
    Raises LdmfastError for a value that cannot be.
    """

    precision: str = "exact"
    solver: str | None = None
    steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    guidance_scale: float | None = None
    loras: Mapping[str, float] | None = None
    guidance: tuple[Guidance, ...] = ()
    cache: tuple[Policy, ...] = ()
    promise: Promise | None = None
    model: str | None = None
    version: str | None = None
    device: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise LdmfastError(f"precision={self.precision!r} is none of {', '.join(PRECISIONS)}")
        if self.steps is not None and (isinstance(self.steps, bool) or not isinstance(self.steps, int)
                                       or self.steps < 1):
            raise LdmfastError(f"steps={self.steps!r} is not a whole number of at least 1")
        if self.steps is not None and self.timesteps is not None:
            raise LdmfastError("steps and timesteps were both given: give one of them")
        given = self.cache if isinstance(self.cache, Sequence) else () if self.cache is None else (self.cache,)
        if not all(isinstance(p, Policy) for p in given) or isinstance(given, str):
            raise LdmfastError(f"cache={self.cache!r} is not a policy of ldmfast.caches, or several of them")
        object.__setattr__(self, "cache", tuple(given))
        object.__setattr__(self, "guidance", check_guidance(self.guidance))
        if self.solver is not None and not isinstance(self.solver, str):
            raise LdmfastError(f"solver={self.solver!r} is not a name of a solver")
        if self.guidance_scale is not None and not _finite(self.guidance_scale):
            raise LdmfastError(f"guidance_scale={self.guidance_scale!r} is not a finite number")
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", _numbers("timesteps", self.timesteps))
        if self.loras is not None:
            if not isinstance(self.loras, Mapping) or not all(isinstance(name, str) for name in self.loras):
                raise LdmfastError(f"loras={self.loras!r} is not a table of weights by the names of adapters, as "
                                   "{'style': 0.8}")
            object.__setattr__(self, "loras", dict(self.loras))

    def call(self) -> dict[str, Any]:
        """The arguments of a pipeline's call that these settings stand for, but for the precision."""
        found = {"num_inference_steps": self.steps, "solver": self.solver, "timesteps": self.timesteps,
                 "guidance_scale": self.guidance_scale, "loras": self.loras, "guidance": self.guidance or None,
                 "cache": self.cache or None}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        words = [self.precision, self.solver, self.steps and f"{self.steps} steps",
                 self.timesteps and f"{len(self.timesteps)} timesteps of its own",
                 self.guidance_scale is not None and f"guidance {self.guidance_scale:g}",
                 self.loras and "LoRA " + ", ".join(f"{k} {v:g}" for k, v in self.loras.items()),
                 *map(short, (*self.guidance, *self.cache))]
        found = ", ".join(str(w) for w in words if w)
        if self.promise is not None:
            found += f"; {self.promise.speedup:.2f}x; {self.promise}"
        return "; ".join([found, *self.notes])

    def to_json(self) -> str:
        """Raises LdmfastError for a cache policy or guidance that is not one of ldmfast's, or holds more than numbers
        and names."""
        if not repeatable(self.cache) or not guidance.repeatable(self.guidance):
            raise LdmfastError("settings with a cache policy or guidance of your own cannot be saved: it has no name "
                               "to find it by")
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        row |= {"cache": [p.to_dict() for p in self.cache], "guidance": [g.to_dict() for g in self.guidance],
                "promise": None if self.promise is None else dataclasses.asdict(self.promise)}
        return json.dumps({"ldmfast_settings": 1, **row}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "settings") -> Settings:
        """What to_json wrote. Raises LdmfastError for anything else, naming ``where`` it came from."""
        try:
            row = json.loads(text)
            if row.pop("ldmfast_settings") != 1:
                raise ValueError("another format")
            row["cache"] = from_settings(row["cache"])
            row["guidance"] = guidance.from_settings(row["guidance"])
            row["promise"] = None if row["promise"] is None else Promise(**row["promise"])
            row["notes"] = tuple(row["notes"])
            return cls(**row)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise LdmfastError(f"{where}: holds no settings of this version of ldmfast ({error})") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes JSON under a temporary name, then renames it. Raises LdmfastError where that is not possible."""
        target = Path(path)
        try:
            with replacing(target) as file:
                file.write(self.to_json().encode())
        except OSError as error:
            raise LdmfastError(f"{target}: cannot be written ({error.strerror or error}); give another path") from error
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Settings:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LdmfastError(f"{path}: no readable settings file ({error})") from error
        return cls.from_json(text, str(path))

    def check(self, pipe: Pipeline) -> None:
        """Raises LdmfastError where a promise was made for another model, version or kind of device."""
        if self.promise is None and self.model is None:
            return
        for what, own, here in (("model", self.model, identity(pipe)), ("ldmfast version", self.version, __version__),
                                ("device", self.device, pipe.device.type)):
            if own != here:
                raise LdmfastError(f"these settings were tuned for {what} {own}, here it is {here}: their promise does "
                                   "not hold; call pipe.tune(...) again")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    """A list of numbers, also of numpy or torch. Raises LdmfastError."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, str) or not isinstance(plain, Sequence) or not plain or not all(map(_finite, plain)):
        raise LdmfastError(f"{name}={values!r} is not a list of numbers")
    return tuple(plain)


def short(policy: Any) -> str:
    """A policy or guidance without the arguments that are at their defaults."""
    fields = dataclasses.fields(policy)
    own = {f.name: getattr(policy, f.name) for f in fields}
    words = [f"{f.name}={short(own[f.name]) if isinstance(own[f.name], Policy) else repr(own[f.name])}"
             for f in fields if own[f.name] != f.default]
    return f"{type(policy).__name__}({', '.join(words)})"


def identity(pipe: Pipeline) -> str:
    """Sixteen hex digits of what a pipeline draws with: the weight files' fingerprint, the configs, the adapters."""
    loaded = pipe.loaded
    adapters = None if loaded.loras is None else settings_of(pipe, loaded.loras.chosen)
    configs = [repr(getattr(part, "config", None)) for part in (loaded.unet, loaded.vae)]
    text = json.dumps([loaded.fingerprint, configs, loaded.scheduler_config, loaded.index, loaded.defaults,
                       adapters, fused_settings(pipe)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def beside(pipe: Pipeline) -> Path | None:
    """Where the settings of a pipeline's model are kept; None for the models that ship with ldmfast."""
    source = Path(pipe.source)
    if pipe.reopen is None or not source.exists() or ASSETS in source.resolve().parents:
        return None
    return source / NAME if source.is_dir() else source.with_name(f"{source.stem}.{NAME}")


def find(pipe: Pipeline) -> Settings:
    """What settings="auto" means: those of the last tune of this pipeline, else the file beside the model. Raises
    LdmfastError where there are none, or they belong to another model, version or device."""
    own: Settings | None = pipe.tuned.get("settings")
    if own is None:
        file = beside(pipe)
        if file is None or not file.is_file():
            raise LdmfastError(f"settings='auto': {pipe.source} has not been tuned"
                               f"{'' if file is None else f' ({file} does not exist)'}; call pipe.tune(prompts) or "
                               "'ldmfast tune' first, or give a Settings object")
        own = Settings.load(file)
    own.check(pipe)
    return own


def resolve(pipe: Pipeline, settings: Any) -> Settings:
    """A call's ``settings`` argument, checked. Raises LdmfastError."""
    if settings == "auto":
        return find(pipe)
    if not isinstance(settings, Settings):
        raise LdmfastError(f"settings={settings!r} is neither 'auto' nor a ldmfast.tuning.Settings; a file is read "
                           "with Settings.load(path)")
    settings.check(pipe)
    check_call(pipe, settings.call())
    return settings


def check_call(pipe: Pipeline, names: Iterable[str]) -> None:
    """Raises LdmfastError for an argument that calls of this kind of pipeline do not have."""
    taken = inspect.signature(type(pipe).__call__).parameters
    for name in names:
        if name not in taken:
            raise LdmfastError(f"a call of {type(pipe).__name__} takes no {name}: leave it out of the settings and "
                               "beside them")


def in_precision(pipe: Pipeline, precision: str) -> Pipeline:
    """The pipeline itself, or the same model in another precision, opened once and kept with it, with this one's tiling
    and as eager. Raises LdmfastError where it cannot be opened again, or has adapters that the other would not have."""
    if precision == pipe.precision:
        return pipe
    stack = pipe.loaded.loras
    if stack is not None and (stack.adapters or stack.in_weights):
        raise LdmfastError(f"the settings ask for precision={precision!r} and this {pipe.precision!r} pipeline has "
                           f"LoRA adapters of its own: open the model with precision={precision!r} and load them there")
    if pipe.reopen is None:
        raise LdmfastError(f"the settings ask for precision={precision!r}, this pipeline has {pipe.precision!r} and "
                           "was not opened from a folder or file: open it in that precision")
    with pipe._changing:
        if precision not in pipe.siblings:
            with torch.inference_mode(False):  # its weights are to be ordinary tensors, whoever asks for them
                other = pipe.reopen(precision)
            other.source, other.reopen, other.siblings, other.tuned = (pipe.source, pipe.reopen, pipe.siblings,
                                                                       pipe.tuned)
            pipe.siblings[precision] = other
        found: Pipeline = copy.copy(pipe.siblings[precision])  # which other threads and copies share
    found.vae_tiling = pipe.vae_tiling
    if pipe.engine is None:
        found.engine = None
    return found


def draw(pipe: Pipeline, settings: Any, arguments: dict[str, Any]) -> Any:
    """``pipe(**arguments)`` as the settings say; ``report`` of the result tells what was promised. Raises LdmfastError
    for an argument that the settings set, too."""
    chosen = resolve(pipe, settings)
    own = chosen.call()
    for name in own:
        if arguments.get(name) is not None:
            raise LdmfastError(f"{name} was given beside settings that set it: leave one of them out")
    if chosen.cache:
        check_cache(chosen.cache, pipe.unet, (1.0,))
    out: Any = in_precision(pipe, chosen.precision)(**{**arguments, **own})
    report = out.report or CacheReport.plain(int(out.settings[0]["num_inference_steps"]))
    out.report = dataclasses.replace(report, promise=promised(chosen, out.settings, arguments))
    return out


# of a picture's settings: what names the picture or the machine, and what Settings.check compares
OWN = {"ldmfast", "torch", "model", "fingerprint", "device", "prompt", "seed", "class_label", "batch", "index",
       "repeatable", "arguments", "texts"}
# arguments that a picture's settings do not tell apart
UNSEEN = ("latents", "prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
          "image", "mask_image", "control_image")


def conditions(made: Mapping[str, Any]) -> dict[str, Any]:
    """Of a picture's settings all that a promise depends on, as JSON has it: negative prompts among it, prompts not."""
    found = {name: value for name, value in made.items() if name not in OWN}
    found |= {name: text for name, text in made.get("texts", {}).items() if name.startswith("negative_")}
    plain = json.dumps(found, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value))
    kept: dict[str, Any] = json.loads(plain)
    return kept


def promised(settings: Settings, made: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> str:
    """The promise, if it was measured with the arguments of the call that made pictures with these settings; else
    "nothing", with the first that is another. given: the call's arguments."""
    if settings.promise is None:
        return "nothing: the settings were not tuned"
    for name in UNSEEN:
        if given.get(name) is not None:
            return f"nothing: tuned without {name}, which this call was given"
    there = settings.promise.made
    for here in map(conditions, made):
        for name in [*there, *(here.keys() - there.keys())]:
            if here.get(name) != there.get(name):
                return f"nothing: tuned with {name} {there.get(name)!r}, here {here.get(name)!r}"
    return str(settings.promise)
