"""certify: exact against fast on the same seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import LdmfastError
from ..torch_modes import own_modes
from . import measure
from .measure import Drawn
from .metrics import latent_errors, psnr, ssim
from .report import Arm, Report
from .settings import Settings, check_call, promised, resolve, short

if TYPE_CHECKING:
    from ..pipelines import Pipeline

Judge = Callable[[Tensor, Sequence[str]], Sequence[Mapping[str, bool]]]


@own_modes()
def certify(pipe: Pipeline, prompts: Sequence[str], settings: Settings | str = "auto", *,
            seeds: Sequence[int] | int = 0, reference: Settings | None = None, judge: Judge | None = None,
            batch: int = 1, progress: bool = True, **call: Any) -> Report:
    """Draws every prompt twice from the same noise, as the reference does and as ``settings`` say, and measures what
    differs: PSNR, SSIM (``metrics``), the latents' relative error at matched noise levels after every step, attributes,
    time by step and part, evaluations of the network, memory at the peak. The two take turns, call by call, so that a
    machine that is busy for a while slows both.

    settings: or "auto", what ``tune`` found. seeds: one for each prompt, or that of the first. reference: default
    Settings(), the model's own solver and steps in exact precision. judge(pictures (n, 3, H, W) in [-1, 1], prompts):
    for each picture {attribute: right}; the models that ship with ldmfast have one. batch: pictures a call; time
    depends on it. call: further arguments of both calls, as height= or negative_prompt=.
    Raises LdmfastError, before pictures are drawn where that can be told.
    """
    fast, exact = resolve(pipe, settings), reference or Settings()
    check_call(pipe, exact.call())
    texts, numbers = inputs(prompts, seeds, batch)
    for arm in (exact, fast):  # the first call is slower; it also finds what does not fit the model
        measure.draw(pipe, arm, texts[:1], numbers[:1], call)
    turns = []
    for part in progressed(chunks(len(texts), batch), progress, "certify"):
        turns.append([measure.draw(pipe, arm, texts[part], numbers[part], call) for arm in (exact, fast)])
    promise = None if fast.promise is None else promised(fast, [fast_one.made for _, fast_one in turns], call)
    return _report(pipe, turns, (exact, fast), texts, numbers, judge, promise)


def inputs(prompts: Sequence[str], seeds: Sequence[int] | int, batch: int) -> tuple[list[str], list[int]]:
    """Prompts with a seed for each. Raises LdmfastError."""
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts) or not prompts:
        raise LdmfastError(f"prompts={prompts!r}: give a list of at least one text")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise LdmfastError(f"batch={batch!r} is not a whole number of at least 1")
    numbers = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else list(seeds)
    if len(numbers) != len(prompts):
        raise LdmfastError(f"{len(numbers)} seeds for {len(prompts)} prompts: give one for each, or the first alone")
    return list(prompts), numbers


def chunks(count: int, batch: int) -> list[slice]:
    return [slice(i, min(i + batch, count)) for i in range(0, count, batch)]


def progressed(items: Sequence[Any], show: bool, name: str) -> Any:
    from ..progress import Bar

    return Bar(items, disable=not show, desc=name, unit="turn")


def _report(pipe: Pipeline, turns: list[list[Drawn]], arms: Sequence[Settings], texts: list[str], numbers: list[int],
            judge: Judge | None, promise: str | None) -> Report:
    images = [torch.cat([turn[i].images for turn in turns]) for i in range(2)]
    errors = [latent_errors(b.trajectory, a.trajectory) for a, b in turns]
    by_level = torch.cat([rows for _, rows in errors], dim=1)
    ratios = [a.seconds / b.seconds for a, b in turns]
    chosen, note = (judge, None) if judge is not None else shipped_judge(pipe, texts, images[0])
    rows = [_arm(pipe, [turn[i] for turn in turns], arm, None if chosen is None else _shares(chosen, images[i], texts))
            for i, arm in enumerate(arms)]
    return Report(
        model=pipe.source, prompts=tuple(texts), seeds=tuple(numbers), height=images[0].shape[2],
        width=images[0].shape[3], reference=rows[0], fast=rows[1], psnr=tuple(psnr(images[1], images[0]).tolist()),
        ssim=tuple(ssim(images[1], images[0]).tolist()), levels=tuple(errors[0][0]),
        latent_errors=tuple(tuple(row) for row in by_level.tolist()), speedup=statistics.median(ratios),
        speedups=tuple(ratios), promise=promise,
        notes=tuple(n for n in (note,) if n), pictures={"reference": images[0], "fast": images[1]})


def _arm(pipe: Pipeline, drawn: list[Drawn], settings: Settings, attributes: dict[str, float] | None) -> Arm:
    counts = [len(d.images) for d in drawn]

    def median(values: Sequence[float]) -> float:
        return statistics.median(v / n for v, n in zip(values, counts))

    def mean(values: Sequence[float]) -> float:
        return sum(v * n for v, n in zip(values, counts)) / sum(counts)

    made = drawn[0].made
    words = [settings.precision, str(made["solver"]), f"{made['num_inference_steps']} steps",
             f"guidance {made['guidance_scale']:g}", *map(short, (*settings.guidance, *settings.cache))]
    if settings.loras:
        words.append("LoRA " + ", ".join(f"{k} {v:g}" for k, v in settings.loras.items()))
    memory = [d.memory for d in drawn if d.memory is not None]
    return Arm(", ".join(words), median([d.seconds for d in drawn]),
               {p: median([d.parts[p] for d in drawn]) for p in measure.PARTS},
               [median([d.step_seconds[i] for d in drawn]) for i in range(len(drawn[0].step_seconds))],
               mean([d.evaluations for d in drawn]), mean([d.rows for d in drawn]), max(memory, default=None),
               attributes)


def shipped_judge(pipe: Pipeline, texts: Sequence[str], images: Tensor) -> tuple[Judge | None, str | None]:
    """The judge of the models that ship with ldmfast, or why it does not apply."""
    from ..pipelines.pipeline import TINY
    from ..testing.captions import parse_caption
    from ..testing.judge import judge
    from ..testing.scenes import SIZE

    if pipe.source not in TINY.values():
        return None, None
    if tuple(images.shape[2:]) != (SIZE, SIZE):
        return None, f"attributes: not judged, the judge reads pictures of {SIZE}x{SIZE}"
    try:
        for text in texts:
            parse_caption(text)
    except ValueError as error:
        return None, f"attributes: not judged, a prompt is no caption of the scenes ({error})"
    return lambda pictures, captions: judge(pictures, [parse_caption(c) for c in captions]), None


def _shares(judge: Judge, images: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Attribute -> the share that is right."""
    found: dict[str, list[bool]] = defaultdict(list)
    verdicts = judge(images * 2 - 1, texts)
    if len(verdicts) != len(texts):
        raise LdmfastError(f"judge gave {len(verdicts)} verdicts for {len(texts)} pictures: give one for each")
    for verdict in verdicts:
        for attribute, right in verdict.items():
            found[attribute].append(bool(right))
    return {name: statistics.fmean(values) for name, values in found.items()}
