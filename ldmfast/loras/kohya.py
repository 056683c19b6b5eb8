"""kohya's layout (A1111, ComfyUI): ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``,
``.lora_up.weight`` and ``.alpha``; the modules of SDXL's UNet may have CompVis' names.
Convolutions have ``lora_down`` of the layer's kernel size and ``lora_up`` of size 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ..checkpoints import to_ldm
from ..errors import CheckpointError
from .key import Key

_PREFIXES = {"lora_unet_": "unet", "lora_transformer_": "transformer", "lora_te_": "text_encoder",
             "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "the T5 encoder"}
_KEY = re.compile(r"(lora_unet_|lora_transformer_|lora_te[123]?_)([^.]+)\.(?:lora_(down|up)\.weight|(alpha))$")


def parse(key: str) -> Key | None:
    match = _KEY.match(key)
    if match is None:
        return None
    return Key(_PREFIXES[match[1]], match[2].removeprefix("text_model_"), match[3] or match[4], flat=True)


def spellings(component: str, modules: Iterable[str], wanted: Collection[str]) -> dict[str, str]:
    """What this layout calls each module (diffusers' names, text encoders' without "text_model.") -> the module; with
    CompVis' names if one of those wanted needs them."""
    names = list(modules)
    flat = {name.replace(".", "_"): name for name in names}
    if component == "unet" and any(name not in flat for name in wanted):
        layout = to_ldm.Layout.of(f"{name}." for name in names)
        try:
            compvis = {to_ldm.rename("unet", f"{name}.weight", layout).name: name for name in names}
        except CheckpointError:  # a network that this layout never held
            return flat
        flat.update({old.removesuffix(".weight").replace(".", "_"): name for old, name in compvis.items()})
    return flat
