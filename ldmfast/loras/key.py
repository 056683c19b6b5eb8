"""What the key of one tensor in a LoRA file says, whatever the layout."""

from __future__ import annotations

import re
from typing import NamedTuple

DENOISERS = ("unet", "transformer")
COMPONENTS = (*DENOISERS, "text_encoder", "text_encoder_2")
_COMPONENT = re.compile(r"(unet|transformer|text_encoder|text_encoder_2|diffusion_model)\.")


class Key(NamedTuple):
    """component: "unet" (of a layout that calls every denoiser so), "transformer", "text_encoder", "text_encoder_2", or
    None where the layout does not say. module: of diffusers' network or of the original one, if ``flat`` with
    underscores for dots. role: "down", "up" or "alpha"."""

    component: str | None
    module: str
    role: str
    flat: bool = False


def dotted(name: str, role: str) -> Key:
    """The key of a module that may have its component in front."""
    name = name.replace(".processor.", ".")
    match = _COMPONENT.match(name)
    if match is None:
        return Key(None, name, role)
    return Key("unet" if match[1] == "diffusion_model" else match[1], name[match.end():], role)
