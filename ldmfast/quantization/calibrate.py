"""Calibrates a checkpoint: draws a few pictures, measures every layer, writes the int8 file beside the weights."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import checkpoints
from ..errors import CheckpointError, LdmfastError
from ..models import REGISTRY
from ..models.gemm import Conv2d, Linear
from . import store
from .measure import Meter, thirds
from .plan import Plan, choose

LEAST = 20.0  # dB; docs/performance.md has the measurement behind it
PROMPTS = (
    "a photograph of a red car in front of a brick house", "a portrait of an old man with a white beard, oil painting",
    "a bowl of green apples on a wooden table", "a mountain lake at sunrise, wide angle",
    "two cats sleeping on a blue sofa", "a city street at night in the rain, neon lights",
)


@dataclass(frozen=True)
class Report:
    """What ``quantize`` found. file: what it wrote. ends: where the ranges of timesteps end."""

    file: Path
    plan: Plan
    ends: tuple[float, ...]
    weights: dict[str, int]  # every linear and convolution -> numbers in its weight

    def __str__(self) -> str:
        """One line a block, then the layers that stay in bf16."""
        sqnr = self.plan.sqnr or {}
        blocks: dict[str, list[str]] = defaultdict(list)
        for name in sqnr:
            blocks[_block(name)].append(name)
        head = "".join(f"{_range(i, self.ends):>16s}" for i in range(len(self.ends)))
        lines = [f"SQNR in dB, the least of each block's layers\n{'block':40s} layers{head}"]
        for block, names in blocks.items():
            worst = [min(sqnr[n][i] for n in names) for i in range(len(self.ends))]
            lines.append(f"{block:40s} {len(names):6d}" + "".join(f"{x:16.1f}" for x in worst))
        kept = {n for r in self.plan.ranges for n in r.kept}
        total, eight = sum(self.weights.values()), sum(n for k, n in self.weights.items() if self.plan.needs_int8(k))
        lines.append(f"{eight / max(1, total):.1%} of the weights of linears and convolutions run in 8 bits" + (
            f"; in bf16 for all or some timesteps: {', '.join(sorted(kept))}" if kept else ""))
        return "\n".join(lines)

    def table(self) -> str:
        """One line a layer, the worst first."""
        sqnr = self.plan.sqnr or {}
        width = max((len(n) for n in sqnr), default=5)
        head = "".join(f"{_range(i, self.ends):>16s}" for i in range(len(self.ends)))
        lines = [f"{'layer':{width}s} {'weights':>10s}{head}  runs in"]
        for name in sorted(sqnr, key=lambda n: min(sqnr[n])):
            modes = ["bf16" if name in self.plan.ranges[self.plan.at(_inside(i, self.ends))].kept else "int8"
                     for i in range(len(self.ends))]
            lines.append(f"{name:{width}s} {self.weights[name]:10d}" + "".join(f"{x:16.1f}" for x in sqnr[name])
                         + "  " + " ".join(dict.fromkeys(modes)))
        return "\n".join(lines)


def _inside(i: int, ends: Sequence[float]) -> float:
    """A timestep in range i."""
    return ends[i - 1] if i else -1.0


def _range(i: int, ends: Sequence[float]) -> str:
    begin = ends[i - 1] if i else 0
    return f"t >= {begin:g}" if i == len(ends) - 1 and i else (
        "all t" if len(ends) == 1 else f"{begin:g} <= t < {ends[i]:g}")


def _block(name: str) -> str:
    parts = name.split(".")
    depth = 4 if parts[0] in ("down_blocks", "up_blocks") else 3 if len(parts) > 3 else 1
    return ".".join(parts[:depth])


def quantize(path: str | os.PathLike[str], *, prompts: Sequence[str] = PROMPTS, steps: int = 12, least: float = LEAST,
             variant: str | None = None, progress: bool = True) -> Report:
    """Calibrates the denoiser of a diffusers folder or single file for ``precision="int8"``.

    Draws ``prompts`` in bf16 with ``steps`` solver steps, measures the signal to quantisation noise of each linear and
    convolution on their activations, in three ranges of timesteps, and writes the plan (layers below ``least`` dB stay
    in bf16 in that range) with the int8 weights into one file beside the weights, which loading finds. Raises
    CheckpointError, and LdmfastError for empty prompts.
    """
    from ..pipelines import Pipeline
    from ..pipelines.load import denoiser_part, fingerprint_of, int8_file
    from ..progress import Bar

    if not prompts:
        raise LdmfastError("quantize needs at least one prompt to draw: leave prompts out to use its own")
    single = Path(path).is_file()
    parts = checkpoints.open_single_file(Path(path)) if single else checkpoints.open_folder(Path(path), variant=variant)
    file = int8_file(parts)
    if not os.access(file.parent, os.W_OK):
        raise CheckpointError(f"{file}: cannot be written, since its folder is read-only; copy the model to one "
                              "that is not")
    pipe = (Pipeline.from_single_file(path, precision="bf16") if single
            else Pipeline.from_pretrained(path, precision="bf16", variant=variant))
    meter = Meter(pipe.unet)
    with meter.watching():
        for i, prompt in enumerate(Bar(prompts, desc="calibrate", unit="picture", disable=not progress)):
            pipe(prompt, num_inference_steps=steps, generator=i, output_type="latent", progress=False)
    ends = thirds(list(meter.energies))
    plan = choose(meter.sqnr(ends), ends, least)
    weights = {name: layer.dense().numel() for name, layer in pipe.unet.named_modules()
               if isinstance(layer, (Linear, Conv2d))}
    part = denoiser_part(parts)
    config: dict[str, Any] = parts.config(part)
    name = config.get("_class_name") or parts.class_name(part)
    if name not in REGISTRY:
        raise CheckpointError(f"{parts.path}: part {part!r} is a {name}, which is not supported")
    del pipe, meter
    store.save(file, REGISTRY[name][1].from_weights(config, parts.weights(part)), plan, fingerprint_of(parts))
    return Report(file, plan, tuple(ends), weights)
