"""Random LoRAs for the shipped model, their spelling in every layout, and what diffusers makes of the dense sum."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

import ldmfast

FOLDER = Path(ldmfast.__file__).parent / "assets" / "tiny"
PROMPT = "a red circle above a blue square"


@dataclass(frozen=True)
class Matrices:
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def delta(self) -> Tensor:
        """alpha / r up down in float64, shaped as the weight of the layer."""
        product = torch.einsum("or,r...->o...", self.up.flatten(1).double(), self.down.double())
        return product * (self.alpha / len(self.down))


Lora = dict[str, Matrices]


def diffusers_pipeline():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def layers(pipe, component: str) -> dict[str, nn.Module]:
    """Name in LoRA files -> layer."""
    prefix = "unet." if component == "unet" else f"{component}.text_model."
    return {prefix + name.removeprefix("text_model."): m for name, m in getattr(pipe, component).named_modules()
            if isinstance(m, (nn.Linear, nn.Conv2d))}


def draw(pipe, seed: int, rank: int = 4, strength: float = 0.05, wanted: Callable[[str], bool] = lambda name: True,
         components: Iterable[str] = ("unet", "text_encoder")) -> Lora:
    """One for each linear and convolution that is wanted; ranks and alphas differ from layer to layer."""
    noise = torch.Generator().manual_seed(seed)
    found = {}
    for i, (name, m) in enumerate((n, m) for c in components for n, m in layers(pipe, c).items() if wanted(n)):
        r = rank + i % 3
        w = m.weight
        down = torch.randn(r, *w.shape[1:], generator=noise) * w[0].numel() ** -0.5
        up = torch.randn(w.shape[0], r, *(1 for _ in w.shape[2:]), generator=noise) * strength
        found[name] = Matrices(down, up, (1.0, 2.0, 4.0, 8.0)[i % 4])
    return found


def merged(pipe, *loras: tuple[Lora, float | Callable[[str], float]]):
    """A copy of diffusers' pipeline whose weights are the sum in float64, rounded once."""
    pipe = copy.copy(pipe)
    pipe.unet, pipe.text_encoder = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    for component in ("unet", "text_encoder"):
        for name, m in layers(pipe, component).items():
            total = m.weight.data.double()
            for lora, weight in loras:
                if name in lora:
                    w = weight if isinstance(weight, (int, float)) else weight(name)
                    total = total + w * lora[name].delta
            m.weight.data = total.float()
    return pipe


def kohya(lora: Lora) -> dict[str, Tensor]:
    found = {}
    for name, m in lora.items():
        component, _, module = name.partition(".")
        stem = f"{'lora_unet' if component == 'unet' else 'lora_te'}_{module.replace('.', '_')}"
        found |= {f"{stem}.lora_down.weight": m.down, f"{stem}.lora_up.weight": m.up,
                  f"{stem}.alpha": torch.tensor(m.alpha)}
    return found


def processors(lora: Lora) -> dict[str, Tensor]:
    """diffusers' first layout: attention processors, the rest as ``lora`` (UNet) or ``lora_linear_layer`` (text)."""
    found = {}
    for name, m in lora.items():
        text = name.startswith("text_encoder")
        stem = re.sub(r"(attn\d)\.(to_[qkv]|to_out)(?:\.0)?$", r"\1.processor.\2_lora", name)
        if text:
            stem = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1_lora", name)
        stem += "" if stem.endswith("_lora") else ".lora_linear_layer" if text else ".lora"
        found |= {f"{stem}.down.weight": m.down, f"{stem}.up.weight": m.up, f"{stem}.alpha": torch.tensor(m.alpha)}
    return found


def lora_a_b(lora: Lora) -> dict[str, Tensor]:
    return {f"{name}.lora_{which}.weight": tensor for name, m in lora.items()
            for which, tensor in (("A", m.down), ("B", m.up))}


def alphas(lora: Lora) -> dict[str, float]:
    return {f"{name}.alpha": m.alpha for name, m in lora.items()}


def metadata(lora: Lora) -> dict[str, object]:
    """peft's config of both components, as diffusers keeps it in a file's header."""
    found: dict[str, object] = {}
    for component in ("unet", "text_encoder"):
        own = {n.partition(".")[2]: m.alpha for n, m in lora.items() if n.startswith(component + ".")}
        found |= {f"{component}.r": 4, f"{component}.lora_alpha": 1.0, f"{component}.alpha_pattern": own}
    return found
