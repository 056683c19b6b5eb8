"""LoRAs of transformers under the names that their authors gave the layers: kohya's (``lora_unet_double_blocks_0_...``)
and ComfyUI's (``diffusion_model.double_blocks.0...``). A layer there may be several of diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from ..checkpoints.dit import DIT, PIXART
from ..checkpoints.flux import FLUX
from ..checkpoints.ldm import SPLITS
from ..checkpoints.sd3 import SD3

_NUMBER = r"(\d+)"


class Target(NamedTuple):
    """Modules of diffusers' whose outputs are below each other in the original layer. swapped: the original has the
    halves of the outputs the other way round (scale and shift of a last norm)."""

    modules: tuple[str, ...]
    swapped: bool


def names(modules: Mapping[str, object]) -> dict[str, Target]:
    """The original name of every layer -> its place among diffusers' names, of the rules by which checkpoints are read
    that lead to layers which are there."""
    blocks = 1 + max((int(n) for name in modules for n in re.findall(r"blocks\.(\d+)\.", name)), default=-1)
    found: dict[str, Target] = {}
    for pattern, template, kind in (*FLUX, *SD3, *DIT, *PIXART):
        if template is None or kind == "each" or not pattern.endswith(r"\."):
            continue
        for i in range(blocks) if _NUMBER in pattern else (0,):
            old = pattern.replace(_NUMBER, str(i)).replace(r"\.", ".").rstrip(".")
            new = tuple(template.format(i, qkv=part).rstrip(".") for part in SPLITS.get(kind, ("",)))
            swapped = kind == "swap" or (kind == "swap_last" and i == blocks - 1)
            if all(module in modules for module in new):
                found[old] = Target(new, swapped)
    return found
